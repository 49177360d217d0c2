"""Without a GPU the kernels run through triton's interpreter, which is decided before import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

import laclip.kernels.testing  # noqa: F401


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
