"""Fixtures shared by several test files."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "examples" / "emoji"


@pytest.fixture
def emoji_copy(tmp_path):
    """A copy of the embedded training set that a test may damage."""
    folder = tmp_path / "train"
    shutil.copytree(EMOJI / "train", folder)
    return folder


@pytest.fixture(scope="session")
def job_environment():
    """Variables for a training job that a test starts without the launcher."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment
