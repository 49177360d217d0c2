"""Builds DeepSpeed's shared-memory operator once, so that no training run waits for it.

TORCH_EXTENSIONS_DIR=DIR python requirements/build_deepspeed_op.py     (nothing to do with a GPU)
"""

import contextlib
import io
import os
import sys
import time

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    print("laclip set-up: building DeepSpeed's CPU operator (once, one to two minutes)", flush=True)
    start = time.time()
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            from deepspeed.accelerator import get_accelerator

            get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except Exception as error:
        sys.exit(
            f"laclip set-up: DeepSpeed's CPU operator did not build: {error}\n{output.getvalue()}"
        )
    print(f"laclip set-up: built in {time.time() - start:.0f} s")
