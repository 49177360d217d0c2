"""Checks that torch, its CUDA, triton and the NVIDIA driver fit together.

python requirements/check.py
python requirements/check.py --gpu     only tells, by its exit code, whether a GPU can be used here
python requirements/check.py --driver  only looks at the driver, before anything is downloaded
"""

import ctypes
import re
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
    """The newest CUDA that the NVIDIA driver serves; None where no GPU can be used.

    Asked of the driver itself: containers often lack nvidia-smi.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, gpus = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(gpus)) or not gpus.value:
        return None
    driver.cuDriverGetVersion(ctypes.byref(number))  # 13020 is 13.2
    return number.value // 1000, number.value % 1000 // 10


def main() -> None:
    driver = driver_cuda()
    if "--gpu" in sys.argv:
        sys.exit(driver is None)
    if driver is not None and driver < (13, 0):
        fail(
            f"the NVIDIA driver here serves CUDA {driver[0]}.{driver[1]} at most, torch and DALI "
            "need CUDA 13. Install driver 580 or newer, or work on the CPU: CUDA_VISIBLE_DEVICES="
        )
    if "--driver" in sys.argv:
        return
    if installed("torch") == "none":
        fail(f"torch is not installed beside {sys.executable}. Run: make train (without PYTHON=)")
    import torch

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
