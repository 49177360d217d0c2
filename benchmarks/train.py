"""The training step against open_clip's: same weights, images, captions, precision, machine.

python requirements/oracles.py benchmarks/train.py [--models vit_b_32 ...] [--out FILE]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from harness import Case, append, compare, table
from torch import Tensor
from torch.nn.functional import normalize

from laclip.config import PRESETS, DataConfig, ModelConfig, TextConfig, VisionConfig
from laclip.convert import to_laclip
from laclip.flops import peak_flops, training_flops
from laclip.kernels import clip_loss
from laclip.model import build_model, compile_blocks
from laclip.optimizer import build_optimizer

VOCABULARY, EOT, CONTEXT = 49408, 49407, 77
# For 80 GB with four models and their optimizers; `small` is what two CPU cores can train.
BATCHES = {"vit_b_32": 1024, "vit_b_16": 512, "vit_l_14": 128, "small": 16}
SMALL = {
    "embed_dim": 256,
    "vision": {"patch_size": 32, "width": 384, "depth": 6, "heads": 6},
    "text": {"width": 256, "depth": 6, "heads": 4},
}
ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], Tensor]


def configure(model: str) -> ModelConfig:
    values = PRESETS.get(model, SMALL)
    return ModelConfig(
        embed_dim=values["embed_dim"],
        vision=VisionConfig(**values["vision"]),
        text=TextConfig(**values["text"]),
    )


def original(config: ModelConfig) -> torch.nn.Module:
    """open_clip's model of the same architecture."""
    vision, text = config.vision, config.text
    return open_clip.model.CLIP(
        config.embed_dim,
        {
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
        },
        {"layers": text.depth, "width": text.width, "heads": text.heads, "vocab_size": VOCABULARY},
    )


def draw_batch(batch: int, device: str, full: bool = False) -> Batch:
    """Random images, and captions of 20 +- 8 tokens (about web alt-text), or of all 77."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    lengths = (torch.randn(batch, generator=generator) * 8 + 20).clamp(5, CONTEXT).round().int()
    token_ids = torch.zeros(batch, CONTEXT, dtype=torch.int32)
    for row, length in enumerate([CONTEXT] * batch if full else lengths.tolist()):
        ids = torch.randint(1, EOT - 1, (length - 2,), generator=generator)
        token_ids[row, :length] = torch.tensor([EOT - 1, *ids.tolist(), EOT])
    return images.to(device), token_ids


def our_step(model, precision) -> Step:
    optimizer = build_optimizer(model, learning_rate=5e-4, **ADAMW)

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(batch[0].device.type, precision, enabled=precision is not None):
            image_features, text_features, logit_scale = model(*batch)
        loss = clip_loss(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        return loss

    return step


def open_clip_step(model, precision) -> Step:
    """What open_clip_train does in a step: its loss, AdamW as it sets it, the scale clamped."""
    groups: list[dict] = [{"params": [], "weight_decay": wd} for wd in (0.0, 0.2)]
    for parameter in model.parameters():
        groups[parameter.ndim >= 2]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=ADAMW["betas"], eps=ADAMW["eps"])
    loss_function = open_clip.ClipLoss()

    def step(batch: Batch) -> Tensor:
        images, token_ids = batch
        token_ids = token_ids.to(images.device, torch.long)
        optimizer.zero_grad()
        with torch.autocast(images.device.type, precision, enabled=precision is not None):
            loss = loss_function(*model(images, token_ids))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss

    return step


def build_steps(config: ModelConfig, device: str, precision, compiled: bool) -> dict[str, Step]:
    """The rivals' steps, all from the same weights."""
    torch.manual_seed(0)
    theirs = original(config)
    weights = theirs.state_dict()
    steps = {}
    for graph in (False, True) if compiled else (False,):
        ours = build_model(config, VOCABULARY, EOT)
        ours.load_state_dict(to_laclip(weights))
        ours.to(device)
        theirs = original(config)
        theirs.load_state_dict(weights)
        theirs.to(device)
        if graph:
            compile_blocks(ours)
            theirs = torch.compile(theirs)
        suffix = " compiled" if graph else ""
        steps[f"laclip{suffix}"] = our_step(ours, precision)
        steps[f"open_clip{suffix}"] = open_clip_step(theirs, precision)
    return steps


def check(steps: dict[str, Step], batch: Batch, precision) -> dict[str, float]:
    """The first losses, which must agree, or nothing is reported."""
    losses = {name: step(batch).item() for name, step in steps.items()}
    spread = max(losses.values()) - min(losses.values())
    if spread > (1e-4 if precision is None else 2e-2):
        raise SystemExit(f"the first losses disagree: {losses}; nothing is reported")
    return losses


def counting_cpu(step: Callable[[Any], object], taken: list[float]) -> Callable[[Any], object]:
    """Also notes the seconds that the process computed: others on the machine do not stretch them.

    With one thread (OMP_NUM_THREADS=1) these are the seconds of a core of one's own.
    """

    def run(state: Any) -> object:
        begin = time.process_time()
        output = step(state)
        taken.append(time.process_time() - begin)
        return output

    return run


def real_batches(dataset: Path, size: int, batch: int, device: str) -> Iterator[Batch]:
    # Here, so that random images need neither DALI nor laclip's extension.
    from laclip.dataset import open_dataset
    from laclip.loader import Loader
    from laclip.tokenizer import load_tokenizer

    loader = Loader(
        [open_dataset(dataset)],
        DataConfig(),
        load_tokenizer(),
        seed=0,
        global_batch_size=batch,
        image_size=size,
        context_length=CONTEXT,
        device=torch.device(device),
    )
    for loaded in loader:
        yield loaded.images, loaded.captions  # type: ignore[misc]


def parts_of_our_step(config: ModelConfig, batch: Batch, precision) -> list[Case]:
    """Each part of our eager step on its own, forward and backward."""
    images, token_ids = batch
    device = images.device
    model = build_model(config, VOCABULARY, EOT).to(device)
    optimizer = build_optimizer(model, learning_rate=5e-4, **ADAMW)
    features = [normalize(torch.randn(len(images), config.embed_dim), dim=1) for _ in range(2)]
    leaves = [f.to(device, precision).requires_grad_() for f in features]
    scale = torch.tensor(14.3, device=device)

    def backward(call: Callable[[], Tensor]) -> Callable[[Any], object]:
        def run(_turn: Any) -> None:
            with torch.autocast(device.type, precision, enabled=precision is not None):
                output = call()
            output.float().sum().backward()

        return run

    return [
        Case("part: image tower", backward(lambda: model.encode_image(images))),
        Case("part: text tower", backward(lambda: model.encode_text(token_ids))),
        Case("part: loss", backward(lambda: clip_loss(*leaves, scale))),
        Case("part: optimizer", lambda _turn: optimizer.step()),
    ]


def run(model: str, args: argparse.Namespace, device: str) -> list:
    config, batch_size = configure(model), args.batch or BATCHES[model]
    precision = torch.bfloat16 if args.precision == "bf16" else None
    batch, full = (draw_batch(batch_size, device, full) for full in (False, True))
    steps = build_steps(config, device, precision, not args.eager)
    losses = check(steps, batch, precision)
    tokens = float((batch[1] != 0).sum(dim=1).float().mean())
    clocks: dict[str, list[float]] = {}
    cases = []

    def add(name: str, step: Step, prepare: Callable[[int], Batch], tokens: float | None) -> None:
        run = counting_cpu(step, clocks.setdefault(name, []))
        extra = {"mean_tokens": tokens, "first_loss": losses.get(name)}
        cases.append(Case(name, run, prepare, batch_size, "pairs/s", extra=extra))

    for name, step in steps.items():
        add(name, step, lambda _turn: batch, tokens)
    add("laclip, all captions of 77", steps["laclip"], lambda _turn: full, CONTEXT)
    if args.data:
        batches = real_batches(args.data, config.vision.image_size, batch_size, device)
        best = steps.get("laclip compiled", steps["laclip"])
        add("laclip, real data", lambda _turn: best(next(batches)), lambda turn: turn, None)  # type: ignore
    for part in parts_of_our_step(config, batch, precision):
        add(part.name, part.run, part.prepare, tokens)  # type: ignore[arg-type]
    records = compare(
        f"training step, {model}",
        cases,
        shape={"batch": batch_size, "image_size": config.vision.image_size, "tokens": CONTEXT},
        dtype=args.precision,
        device=device,
        seconds=args.seconds,
    )
    rival = next(r for r in records if r.name == "open_clip")
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    cpu = {name: 1e3 * statistics.median(taken) for name, taken in clocks.items()}
    for record in records:
        whole = not record.name.startswith("part: ")
        record.throughput = record.throughput if whole else None
        milliseconds = cpu[record.name] if device == "cpu" else record.median
        base = cpu["open_clip"] if device == "cpu" else rival.median
        counted = whole and milliseconds
        record.extra["cpu_ms"] = milliseconds if device == "cpu" else None
        record.extra["speed_up"] = base / milliseconds if counted and base else None
        for kind, tokens in (("padded", None), ("real", record.extra["mean_tokens"])):
            known = counted and (kind == "padded" or tokens is not None)
            flops = (
                training_flops(config, tokens) * batch_size / (milliseconds / 1e3) if known else 0
            )
            record.extra[f"tflops_{kind}"] = flops / 1e12 if known else None
            record.extra[f"mfu_{kind}"] = flops / peak if known and peak else None
    return records


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=BATCHES)
    parser.add_argument("--batch", type=int, help="default: by model, for 80 GB or two cores")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each case")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--data", type=Path, help="also train on this dataset folder")
    parser.add_argument("--out", type=Path, help="a result file that records are added to")
    args = parser.parse_args()
    for model in args.models or ([*BATCHES][:3] if gpu else ["small"]):
        records = run(model, args, "cuda" if gpu else "cpu")
        print(table(records))
        if args.out:
            append(records, args.out)


if __name__ == "__main__":
    main()
