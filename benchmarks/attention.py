"""Attention forward and backward at the towers' lengths, by backend.

python benchmarks/attention.py [--precision bf16] [--out FILE]

50, 197 and 257 tokens are ViT-B/32's, B/16's and L/14's images; 77 causal is a padded caption. On a
CPU the times are those of the process: run it with OMP_NUM_THREADS=1.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, append, compare, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from laclip.attention import Layout, attend

SHAPES = [(50, 12, False), (77, 8, True), (197, 12, False), (257, 16, False)]
HEAD_DIM = 64
PYTORCH = {
    "cuda": {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"math": SDPBackend.MATH},  # its own choice is flash
}


def masked(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool) -> Tensor:
    """As open_clip's text tower has it: a mask tensor instead of is_causal."""
    ((sequences, tokens),) = layout.groups
    a, b, c = (t.unflatten(0, (sequences, tokens)).transpose(1, 2) for t in (q, k, v))
    mask = torch.full((tokens, tokens), float("-inf"), device=q.device, dtype=q.dtype).triu(1)
    output = F.scaled_dot_product_attention(a, b, c, attn_mask=mask if causal else None)
    return output.transpose(1, 2).flatten(0, 1)


def backward(attention: Callable[..., Tensor], rows: Tensor, *options: Any) -> Callable:
    # As the layer above gives it: a sum would give one without strides, which the kernels copy.
    gradient = torch.randn(rows.select(1, 0).shape, device=rows.device, dtype=rows.dtype)

    def run(_turn: Any) -> None:
        q, k, v = rows.detach().requires_grad_().unbind(1)
        attention(q, k, v, *options).backward(gradient)

    return run


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512 if gpu else 8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    parser.add_argument("--out", type=Path, help="a result file that records are added to")
    args = parser.parse_args()
    device = "cuda" if gpu else "cpu"
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    backends = ["sdpa"]
    if gpu:
        packages = ("flash_attn", "xformers")
        backends += [name for name in packages if importlib.util.find_spec(name)]
    for tokens, heads, causal in SHAPES:
        rows = torch.randn(args.batch * tokens, 3, heads, HEAD_DIM, device=device, dtype=dtype)
        layout = Layout(((args.batch, tokens),))
        cases = [
            Case(f"laclip, {name}", backward(attend, rows, layout, causal, name))
            for name in backends
            if name != "xformers" or not causal  # causal there means packed captions
        ]
        cases.append(
            Case(
                "mask tensor" if causal else "PyTorch's choice",
                backward(masked, rows, layout, causal),
            )
        )
        choice = cases[-1].run
        for name, backend in PYTORCH[device].items():

            def alone(turn: Any, run=choice, backend=backend) -> None:
                with sdpa_kernel(backend):
                    run(turn)

            if not causal:
                cases.append(Case(f"PyTorch's {name}", alone))
        for case in cases:
            # Forward 4 tokens^2 FLOPs a channel, backward two and a half times that.
            case.work = 14.0 * args.batch * heads * tokens**2 * HEAD_DIM
            case.unit, case.divisor = "TFLOP/s", 1e12
        shape = {"batch": args.batch, "tokens": tokens, "heads": heads, "causal": int(causal)}
        records = compare(
            "attention",
            cases,
            shape=shape,
            dtype=args.precision,
            device=device,
            clock=time.process_time,
        )
        print(table(records))
        if args.out:
            append(records, args.out)


if __name__ == "__main__":
    main()
