"""Fixtures shared by several test files."""

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
