"""Runs a script beside the packages of oracles.txt, which are installed on first use.

python requirements/oracles.py SCRIPT [ARGUMENT ...]

The packages lie in .venv/oracles-HASH (HASH: of the pins and the Python version) and are visible to
the script alone, behind those of the running environment, whose torch they share.
"""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).with_name("oracles.txt")
CACHE = Path(__file__).parent.parent / ".venv"


def install() -> Path:
    """Returns the folder with the packages; two processes that install at once do no harm."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = hashlib.sha256(PINS.read_bytes() + version.encode()).hexdigest()[:12]
    folder = CACHE / f"oracles-{name}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    fresh = tempfile.mkdtemp(prefix="oracles-", dir=CACHE)
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "--target", fresh, "-r", str(PINS)])
    if done.returncode:
        shutil.rmtree(fresh)
        sys.exit(f"oracles: pip could not install {PINS} (exit code {done.returncode}); see above")
    try:
        os.rename(fresh, folder)
    except OSError:  # another process was first
        shutil.rmtree(fresh)
    return folder


def declare_torchvision_operators() -> None:
    """Lets torchvision's Python part import where its compiled part does not load.

    open_clip, timm and transformers import torchvision for image transforms and a frozen batch
    norm; its operators, compiled for CUDA, are called by none of them.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # the definitions live as long as it does


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.path.append(str(install()))
    sys.path[0] = str(Path(sys.argv[1]).parent.resolve())
    declare_torchvision_operators()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
