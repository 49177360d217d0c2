"""Matrix products with fp32 results, whatever the operands' dtype and the global settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(features: torch.Tensor) -> Iterator[None]:
    """Work on the features' device, without autocast, and without TF32 or bf16 in fp32 products."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.cuda.device_of(features),
            torch.autocast(features.device.type, enabled=False),
        ):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


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
