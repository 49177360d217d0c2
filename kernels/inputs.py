"""What the losses accept, checked in one place: user errors are ValueErrors that name the fault."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def choose_implementation(implementation: str, features: torch.Tensor) -> str:
    """Resolve "auto": Triton on CUDA, blocks of rows on a CPU, the reference for float64."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation: found {implementation!r}, expected one of "
            + ", ".join(IMPLEMENTATIONS)
        )
    if features.dtype == torch.float64:
        if implementation not in ("auto", "reference"):
            raise ValueError(
                f"float64 features: implementation={implementation!r} takes bfloat16, float16 or "
                "float32; use implementation='reference'"
            )
        return "reference"
    if implementation == "auto":
        return "triton" if features.is_cuda else "chunked"
    return implementation


def check_features(image_features: torch.Tensor, text_features: torch.Tensor) -> None:
    """Raise ValueError unless the two are a batch of image and text features that fit."""
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if features.dtype not in DTYPES:
            raise ValueError(
                f"{name}: found {features.dtype}, expected bfloat16, float16, float32 or float64"
            )
    if image_features.dim() != 2:
        raise ValueError(
            f"image_features: found shape {list(image_features.shape)}, expected [batch, dim]"
        )
    if text_features.dim() not in (2, 3):
        raise ValueError(
            f"text_features: found shape {list(text_features.shape)}, expected [batch, dim] or "
            "[variants, batch, dim]"
        )
    batch, dim = image_features.shape
    if batch == 0 or text_features.numel() == 0:
        raise ValueError(
            f"an empty batch: image_features {list(image_features.shape)}, text_features "
            f"{list(text_features.shape)}; a loss needs at least one pair"
        )
    if text_features.shape[-2:] != image_features.shape:
        raise ValueError(
            f"image_features {list(image_features.shape)} and text_features "
            f"{list(text_features.shape)} disagree: their last two sizes (batch, dim) must be equal"
        )
    if text_features.dtype != image_features.dtype:
        raise ValueError(
            f"image_features is {image_features.dtype}, text_features is {text_features.dtype}: "
            "cast one of them"
        )
    if text_features.device != image_features.device:
        raise ValueError(
            f"image_features is on {image_features.device}, text_features is on "
            f"{text_features.device}: move one of them"
        )
    if dim % 8:
        raise ValueError(
            f"dim: found {dim}, expected a multiple of 8 (the tensor units read 16 bytes at a "
            "time); pad both features with zero columns, which changes no dot product"
        )


def check_scalar(name: str, value: torch.Tensor, features: torch.Tensor) -> None:
    """Raise ValueError unless `value` is a 0-d float32 tensor (float64 beside float64 features)."""
    expected = torch.float64 if features.dtype == torch.float64 else torch.float32
    if not isinstance(value, torch.Tensor) or value.dim() != 0 or value.dtype != expected:
        found = (
            f"{value.dtype} of shape {list(value.shape)}"
            if isinstance(value, torch.Tensor)
            else type(value).__name__
        )
        raise ValueError(f"{name}: found {found}, expected a 0-d tensor of {expected}")
    if value.device != features.device:
        raise ValueError(
            f"{name} is on {value.device}, the features are on {features.device}: move it"
        )


def check_options(label_smoothing: float, chunk_rows: int) -> None:
    """Raise ValueError for a smoothing outside [0, 1] or a block of no rows."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected 0.0 to 1.0")
    if not isinstance(chunk_rows, int) or chunk_rows < 1:
        raise ValueError(f"chunk_rows: found {chunk_rows!r}, expected an integer of at least 1")


def packed(features: torch.Tensor) -> torch.Tensor:
    """Features without gaps between rows, from an address of 16 bytes on: copied where they differ.

    Tensor descriptors want both, and other addresses would also mean other code and other sums. A
    slice may begin anywhere, and to torch a single row is contiguous whatever its stride.
    """
    features = features.detach().contiguous()
    if features.data_ptr() % 16 == 0 and features.stride(-2) == features.shape[-1]:
        return features
    return features.clone(memory_format=torch.contiguous_format)


def never_traced(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Called as it is where torch.compile traces the caller: a graph cannot hold our kernels.

    It would pass their fp32 numbers as fp64, which does not compile. The decorator of torch for
    this is asked while it traces alone, as it takes a second to import.
    """

    @wraps(function)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call
