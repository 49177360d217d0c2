"""Weights of open_clip, Hugging Face or LaCLIP's release, for `model.weights`.

laclip import FILE OUT.pt
"""

import argparse
from pathlib import Path

from laclip.checkpoint import save_weights
from laclip.convert import detect_format, read_checkpoint, to_laclip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, help="a .safetensors file, one of torch.save, or Hugging Face's folder"
    )
    parser.add_argument("out", type=Path, help="where to write; set model.weights to it")


def run(args: argparse.Namespace) -> int:
    state = read_checkpoint(args.file)
    converted = to_laclip(state)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(converted, args.out)
    kind = detect_format(state)
    numbers = sum(tensor.numel() for tensor in converted.values())
    print(f"{args.out}: {numbers / 1e6:.1f} M numbers, from {kind}")
    return 0
