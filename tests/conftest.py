"""Fixtures shared by several test files."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "examples" / "emoji"


@pytest.fixture
def emoji_copy(tmp_path):
    """A copy of the embedded training set that a test may damage."""
    folder = tmp_path / "train"
    shutil.copytree(EMOJI / "train", folder)
    return folder


@pytest.fixture(scope="session")
def ray_environment():
    """Variables of a process that can import Ray, which is installed beside the environment."""
    spec = importlib.util.spec_from_file_location("oracles", ROOT / "requirements" / "oracles.py")
    oracles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracles)
    oracles.PINS = ROOT / "tests" / "data" / "ray.txt"
    more = {"PYTHONPATH": str(oracles.install()), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **more}
