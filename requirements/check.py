"""Checks that torch, its CUDA, triton and the NVIDIA driver fit together.

python requirements/check.py
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version


def fail(*lines: str) -> None:
    sys.exit("\n".join(f"laclip set-up: {line}" for line in lines))


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the NVIDIA driver serves; None where there is no driver."""
    try:
        text = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"CUDA Version: *(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def main() -> None:
    if installed("torch") == "none":
        fail(f"torch is not installed beside {sys.executable}. Run: make train (without PYTHON=)")
    import torch

    driver = driver_cuda()
    cuda = torch.version.cuda
    if driver is None and cuda is not None and "--torch-only" in sys.argv:
        fail(
            f"this machine has no NVIDIA driver, and pip gave torch {torch.__version__} built for "
            f"CUDA {cuda}, whose triton differs from the one that laclip's CPU tests need.",
            "Take the CPU build from PyTorch's own CPU index (pytorch.org, 'Start Locally', CPU): "
            "make train TORCH_INDEX=<address of that index>",
        )
    if driver is not None and cuda is None:
        fail(
            f"this machine has an NVIDIA driver for CUDA {driver[0]}.{driver[1]}, but torch "
            f"{torch.__version__} is a CPU build. Install requirements/cuda.txt."
        )
    if driver is not None and int(cuda.split(".")[0]) > driver[0]:
        fail(
            f"torch {torch.__version__} is built for CUDA {cuda}, the driver serves CUDA "
            f"{driver[0]}.{driver[1]} at most. Install a newer driver (580 or newer for CUDA 13)."
        )
    if "--torch-only" in sys.argv:
        return
    pins = [r for r in requires("torch") or [] if re.match(r"(pytorch-)?triton\b", r)]
    pinned = next((m[1] for r in pins if (m := re.search(r"==\s*([\d.]+)", r))), None)
    found = installed("triton")
    if found == "none" or (pinned is not None and found.split("+")[0] != pinned):
        fail(
            f"torch {torch.__version__} needs triton {pinned or '3.6 or newer'}, found {found}.",
            f"Run: pip install triton=={pinned or '3.6.0'}",
        )
    for package in ("nvidia-dali-cuda130", "deepspeed", "numpy"):
        if installed(package) == "none":
            fail(f"{package} is not installed. Install requirements/c*.txt, or run: make train")
    print(
        f"laclip set-up: torch {torch.__version__} (CUDA {cuda or 'none'}), triton {found}, "
        f"DALI {version('nvidia-dali-cuda130')}, DeepSpeed {version('deepspeed')}: they fit"
    )


if __name__ == "__main__":
    main()
