"""The contrastive losses beside their rivals, in one run, on the same inputs.

python benchmarks/loss.py                       on a GPU: 4k to 128k by dim 512, 768, 1024
python benchmarks/loss.py --device cpu          what a CPU can show: small sizes, ratios
python benchmarks/loss.py --plot FILE           only draw the records in --out

Sizes and dims are taken in the order given, by default what matters most first, and records are
written as they come: a run may be cut. Errors against float64 are measured first, at --error-batch;
an implementation of ours that fails is not timed, and the run ends with an error. Rivals
(open_clip_torch, inf-cl, siglip-kernel) are timed where they are installed: pip install --no-deps
--target FOLDER ..., then PYTHONPATH=FOLDER. TFLOP/s count 8 B^2 D for the softmax loss (2 forward,
6 backward) and 6 B^2 D for the sigmoid loss, whatever is really done.
"""

import argparse
import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import ROOT, Case, Record, append, compare, load, table

from laclip.kernels import clip_loss, siglip_loss

Loss = Callable[..., torch.Tensor]
LOGIT_SCALE, LOGIT_BIAS = 100.0, -10.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_open_clip_loss() -> Any:
    """open_clip's loss.py by itself: the package would also import torchvision and its models."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def installed(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def autocast_open_clip(loss: Loss, device: str) -> Loss:
    def run(image, text, scale):
        with torch.autocast(device, torch.bfloat16, enabled=image.dtype == torch.bfloat16):
            return loss(image, text, scale)

    return run


def clip_losses(device: str) -> dict[str, Loss]:
    """Every implementation of the softmax loss that this machine can run."""
    losses: dict[str, Loss] = {}
    if device == "cuda":
        losses["laclip triton"] = lambda *t: clip_loss(*t, implementation="triton")
    losses["laclip chunked"] = lambda *t: clip_loss(*t, implementation="chunked")
    if module := load_open_clip_loss():
        losses["open_clip eager"] = autocast_open_clip(module.ClipLoss(), device)
        if device == "cuda":
            torch._dynamo.config.recompile_limit = 256  # one compilation a shape, not eager
            compiled = torch.compile(module.ClipLoss(), dynamic=False)
            losses["open_clip compiled"] = autocast_open_clip(compiled, device)
    if device == "cuda" and (inf_cl := installed("inf_cl")):

        def inf_loss(image, text, scale):
            # Its own scale argument all-reduces, so it needs a process group even on one GPU.
            rows = inf_cl.cal_inf_loss(scale * image, text)
            return (rows + inf_cl.cal_inf_loss(scale * text, image)) / 2

        losses["inf-cl"] = inf_loss
    return losses


def siglip_losses(device: str) -> dict[str, Loss]:
    """Every implementation of the sigmoid loss that this machine can run."""
    losses: dict[str, Loss] = {}
    if device == "cuda":
        losses["laclip triton"] = lambda *t: siglip_loss(*t, implementation="triton")
    losses["laclip chunked"] = lambda *t: siglip_loss(*t, implementation="chunked")
    if module := load_open_clip_loss():
        eager = module.SigLipLoss()

        def open_clip(image, text, scale, bias):
            with torch.autocast(device, torch.bfloat16, enabled=image.dtype == torch.bfloat16):
                return eager(image, text, scale, bias)

        losses["open_clip eager"] = open_clip
    if device == "cuda" and (siglip_kernel := installed("siglip_kernel")):
        losses["siglip-kernel"] = lambda image, text, scale, bias: siglip_kernel.fused_siglip_loss(
            image, text, scale.log(), bias
        )
    return losses


def make_inputs(loss: str, kind: str, batch: int, dim: int, dtype: torch.dtype, device: str) -> Any:
    """Unit-length leaves and scalars; "late" pairs are close, as after long training.

    They are as close as a loss of about e^-7 takes: closer ones leave float64 nothing to compare.
    """
    generator = torch.Generator(device).manual_seed(batch + dim)
    image, noise = (
        F.normalize(torch.randn(batch, dim, generator=generator, device=device), dim=-1)
        for _ in range(2)
    )
    share = (math.log(batch) + LOGIT_SCALE**2 / (2 * dim) + 7) / LOGIT_SCALE
    share = 0.0 if kind == "random" else min(share, 0.5)
    text = F.normalize(share * image + (1 - share**2) ** 0.5 * noise, dim=-1)
    scalars = [LOGIT_SCALE] if loss == "clip" else [LOGIT_SCALE / 10, LOGIT_BIAS]
    return [
        *(features.to(dtype).requires_grad_() for features in (image, text)),
        *(torch.tensor(value, device=device, requires_grad=True) for value in scalars),
    ]


def errors(loss: str, losses: dict[str, Loss], batch: int, dim: int, dtype, device) -> dict:
    """Relative Frobenius errors of image gradients against float64, by implementation and kind.

    What does not run, or is ours and wrong, is taken out of `losses`, with a message.
    """
    reference = {"clip": clip_loss, "siglip": siglip_loss}[loss]
    found: dict[str, dict[str, float]] = {}
    for kind in ("random", "late"):
        leaves = make_inputs(loss, kind, batch, dim, dtype, device)
        exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
        exact = torch.autograd.grad(reference(*exact_leaves), exact_leaves[0])[0]
        for name, function in list(losses.items()):
            try:
                gradient = torch.autograd.grad(function(*leaves), leaves[0])[0].double()
                error = float((gradient - exact).norm() / exact.norm())
                if name.startswith("laclip") and not error < 1e-2:
                    raise ArithmeticError(f"it is wrong ({kind}, error {error:.2e})")
            except Exception as problem:
                print(f"loss: {name}, {loss}, dim {dim}: not timed: {problem!r}", file=sys.stderr)
                del losses[name]
                continue
            found.setdefault(name, {})[f"error {kind}"] = error
    return found


def matmul_peak(device: str, dtype_name: str, size: int) -> list[Record]:
    """The machine's own rate for a large product of random matrices, in TFLOP/s."""
    pairs = [
        tuple(torch.randn(size, size, device=device).to(DTYPES[dtype_name]) for _ in range(2))
        for _ in range(2)
    ]
    case = Case(
        "matmul", lambda pair: pair[0] @ pair[1], lambda turn: pairs[turn % 2],
        work=2.0 * size**3, unit="TFLOP/s", divisor=1e12,
    )  # fmt: skip
    return compare("matmul", [case], shape={"size": size}, dtype=dtype_name, device=device)


def cases_for(loss: str, function: Loss, name: str, batch: int, dim: int, dtype, device) -> list:
    """Forward, backward and both, rotating through inputs larger than a GPU's L2 cache."""
    copies = max(1, min(8, math.ceil(128e6 / (2 * batch * dim * dtype.itemsize))))
    sets = [make_inputs(loss, "random", batch, dim, dtype, device) for _ in range(copies)]
    product = 2.0 * batch**2 * dim
    total = 4 * product if loss == "clip" else 3 * product
    forward = product if loss == "clip" else total

    def make_graph(turn):
        leaves = sets[turn % copies]
        return function(*leaves), leaves

    def both(leaves):
        return torch.autograd.grad(function(*leaves), leaves, allow_unused=True)

    rates = {"unit": "TFLOP/s", "divisor": 1e12}
    pick = lambda turn: sets[turn % copies]  # noqa: E731
    steps = [
        Case(f"{name}: forward", lambda leaves: function(*leaves), pick, forward, **rates),
        Case(f"{name}: both", both, pick, total, **rates),
    ]
    if loss == "clip":
        backward = lambda graph: torch.autograd.grad(*graph, allow_unused=True)  # noqa: E731
        steps.insert(1, Case(f"{name}: backward", backward, make_graph, 3 * product, **rates))
    return steps


def plot(records: list[Record], path: Path) -> None:
    """Time and memory of forward + backward against the batch, a row a loss, a column a dim."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [r for r in records if r.name.endswith(": both") and r.median]
    panels = sorted({(r.subject, r.shape["dim"], r.dtype) for r in chosen})
    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(4.5 * len(panels), 8), squeeze=False, constrained_layout=True
    )
    for column, panel in enumerate(panels):
        members = [r for r in chosen if (r.subject, r.shape["dim"], r.dtype) == panel]
        for name in dict.fromkeys(r.name for r in members):
            line = sorted(
                (r.shape["batch"], r.median, r.peak_memory_mib) for r in members if r.name == name
            )
            batches, times, memory = zip(*line)
            axes[0][column].plot(batches, times, marker="o", label=name.removesuffix(": both"))
            axes[1][column].plot(batches, memory, marker="o")
        axes[0][column].set_title(f"{panel[0]}, dim {panel[1]}, {panel[2]}")
        axes[0][column].set_ylabel("forward + backward, ms")
        axes[1][column].set_ylabel("memory beyond inputs, MiB")
        axes[0][column].legend(fontsize=8)
        for row in range(2):
            axes[row][column].set_xscale("log", base=2)
            axes[row][column].set_yscale("log")
            axes[row][column].set_xlabel("batch")
            axes[row][column].grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default)
    parser.add_argument("--sizes", help="batches, e.g. 4096,8192")
    parser.add_argument("--dims", help="feature widths, e.g. 512,768")
    parser.add_argument("--losses", default="clip,siglip")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--error-batch", type=int, help="size at which float64 fits")
    parser.add_argument("--seconds", type=float, default=1.0, help="time a case")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/loss.jsonl")
    parser.add_argument("--plot", type=Path, help="draw the records in --out, and stop")
    options = parser.parse_args()
    if options.plot:
        plot(load([options.out]), options.plot)
        return
    device, dtype = options.device, DTYPES[options.dtype]
    on_gpu = device == "cuda"
    sizes = options.sizes or ("32768,65536,8192,131072,16384,4096" if on_gpu else "512,1024,2048")
    dims = options.dims or ("768,512,1024" if on_gpu else "512")
    records = matmul_peak(device, options.dtype, 8192 if on_gpu else 1024)
    peak = records[0].throughput
    if on_gpu and options.dtype == "bf16":  # the backward's products are fp16
        records += matmul_peak(device, "fp16", 8192)
    append(records, options.out)
    assert peak is not None
    losses: dict[tuple[str, int], dict[str, Loss]] = {}
    error: dict[tuple[str, int], dict] = {}
    wanted = itertools.product(sizes.split(","), dims.split(","), options.losses.split(","))
    for size, dim, loss in ((int(s), int(d), name) for s, d, name in wanted):
        key = loss, dim
        if key not in losses:
            losses[key] = (clip_losses if loss == "clip" else siglip_losses)(device)
            batch = options.error_batch or (4096 if on_gpu else 512)
            error[key] = errors(loss, losses[key], batch, dim, dtype, device)
        cases = [
            case
            for name, function in losses[key].items()
            for case in cases_for(loss, function, name, size, dim, dtype, device)
        ]
        found = compare(
            f"{loss} loss",
            cases,
            shape={"batch": size, "dim": dim},
            dtype=options.dtype,
            device=device,
            seconds=options.seconds,
        )
        for record in found:
            share = record.throughput / peak if record.throughput else None
            record.extra = {"of matmul": share, **error[key][record.name.split(":")[0]]}
        append(found, options.out)
        records += found
        print(table(found), flush=True)
    print(table(records))
    ours = 2 if on_gpu else 1
    wrong = [key for key, kept in losses.items() if sum(n[:6] == "laclip" for n in kept) < ours]
    failed = [r for r in records if r.name.startswith("laclip") and r.failed]
    if wrong or failed:
        sys.exit(f"loss: failed: {wrong}, {[(r.name, r.shape, r.failed) for r in failed]}")


if __name__ == "__main__":
    main()
