"""Set-up's look at the NVIDIA driver, with a driver built for the purpose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / "requirements" / "check.py"
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = GPUS; return 0; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
"""


@pytest.mark.parametrize(
    ("gpus", "version", "has_gpu", "is_refused"),
    [(1, 13010, True, False), (8, 12080, True, True), (0, 12080, False, False)],
)
def test_the_driver_decides_before_anything_is_downloaded(
    tmp_path, gpus, version, has_gpu, is_refused
):
    (tmp_path / "driver.c").write_text(DRIVER)
    options = ["-shared", "-fPIC", f"-DGPUS={gpus}", f"-DVERSION={version}", "driver.c"]
    subprocess.run(["cc", *options, "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}

    def check(option):
        command = [sys.executable, CHECK, option]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert (check("--gpu").returncode == 0) == has_gpu
    done = check("--driver")
    assert (done.returncode != 0) == is_refused
    assert ("serves CUDA 12.8 at most" in done.stderr) == is_refused
