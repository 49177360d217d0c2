"""Matrix products with fp32 results, whatever the operands' dtype and the global settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


@contextmanager
def full_precision(features: torch.Tensor) -> Iterator[None]:
    """Work on the features' device, without autocast, fp32 products in fp32, and all sums too."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by fp32_precision, torch's other way, which that one refuses to see
        before = "highest"
    settings = [backend.fp32_precision for backend in BACKENDS]
    half_sums = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_fp16_accumulation = False
    try:
        with (
            torch.cuda.device_of(features),
            torch.autocast(features.device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, setting in zip(BACKENDS, settings):
            backend.fp32_precision = setting
        torch.backends.cuda.matmul.allow_fp16_accumulation = half_sums


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """Write `a @ b` into the fp32 `out`, or add it, accumulating in fp32 throughout."""
    if a.is_cuda and a.dtype != torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        return
    # A CPU has no product of half-precision operands with an fp32 result.
    a, b = a.float(), b.float()
    if accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)
