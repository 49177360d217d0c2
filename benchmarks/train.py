"""The training step against open_clip's: same weights, images, captions, precision, machine.

python requirements/oracles.py benchmarks/train.py [--models vit_b_32 ...] [--out FILE]

MFU is a share of the data sheet's peak on a GPU; on a CPU, of what a large matrix product reaches
in the same run. There all times are the process's CPU seconds (OMP_NUM_THREADS=1: those of one
core, and of our decoding threads), which others on the machine stretch less than the clock; so
open_clip decodes in the same process there, and in a process for each core beside a GPU. Its own
loader needs webdataset and braceexpand, as benchmarks/loader.py does.
"""

import argparse
import copy
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

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
# For 80 GB with two models and their optimizers; `small` is what two CPU cores can train.
BATCHES = {"vit_b_32": 1024, "vit_b_16": 512, "vit_l_14": 128, "small": 16}
CPU_BATCHES = {"vit_b_32": 16, "vit_b_16": 8, "vit_l_14": 4, "small": 16}  # 10 to 30 s a step
PEAK = "matrix product"  # the case that a CPU's peak is taken from
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


def our_step(model, optimizer, precision) -> Step:
    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(batch[0].device.type, precision, enabled=precision is not None):
            image_features, text_features, logit_scale = model(*batch)
        loss = clip_loss(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        return loss

    return step


def open_clip_optimizer(model) -> torch.optim.AdamW:
    """AdamW as open_clip_train sets it."""
    groups: list[dict] = [{"params": [], "weight_decay": wd} for wd in (0.0, 0.2)]
    for parameter in model.parameters():
        groups[parameter.ndim >= 2]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=5e-4, betas=ADAMW["betas"], eps=ADAMW["eps"])


def open_clip_step(model, optimizer, precision) -> Step:
    """What open_clip_train does in a step: its loss, an update, the scale clamped."""
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


class Rivals(NamedTuple):
    steps: dict[str, Step]
    losses: dict[str, float]  # the first of each step
    model: torch.nn.Module  # ours
    optimizer: torch.optim.Optimizer


def build_rivals(config: ModelConfig, batch: Batch, precision, compiled: bool) -> Rivals:
    """The rivals' steps; every first loss is taken on the same weights.

    A compiled step shares parameters and optimizer with its eager twin: half the memory. Where the
    first losses disagree nothing is reported.
    """
    device = batch[0].device
    torch.manual_seed(0)
    theirs = original(config)
    weights = copy.deepcopy(theirs.state_dict())
    ours = build_model(config, VOCABULARY, EOT)
    ours.load_state_dict(to_laclip(weights))
    ours.to(device)
    theirs.to(device)
    optimizer = build_optimizer(ours, learning_rate=5e-4, **ADAMW)
    their_optimizer = open_clip_optimizer(theirs)
    steps = {
        "laclip": our_step(ours, optimizer, precision),
        "open_clip": open_clip_step(theirs, their_optimizer, precision),
    }
    losses = {name: step(batch).item() for name, step in steps.items()}
    if compiled:
        twin = copy.deepcopy(ours, {id(p): p for p in ours.parameters()})
        compile_blocks(twin)
        steps["laclip compiled"] = our_step(twin, optimizer, precision)
        graph = torch.compile(theirs)
        steps["open_clip compiled"] = open_clip_step(graph, their_optimizer, precision)
        ours.load_state_dict(to_laclip(weights))
        theirs.load_state_dict(weights)
        for name in ("laclip compiled", "open_clip compiled"):
            losses[name] = steps[name](batch).item()
    allowed = 1e-4 if precision is None else 2e-2
    if not all(abs(loss - losses["laclip"]) <= allowed for loss in losses.values()):  # nor with NaN
        raise SystemExit(f"the first losses disagree: {losses}; nothing is reported")
    return Rivals(steps, losses, ours, optimizer)


def our_batches(dataset: Path, size: int, batch: int, device: str) -> Iterator[Batch]:
    # Here, so that random images need neither DALI nor laclip's extension.
    from laclip.dataset import open_dataset
    from laclip.loader import Loader
    from laclip.tokenizer import load_tokenizer

    loader = Loader(
        [open_dataset(dataset)],
        DataConfig(captions="original"),
        load_tokenizer(),
        seed=0,
        global_batch_size=batch,
        image_size=size,
        context_length=CONTEXT,
        device=torch.device(device),
    )
    for loaded in loader:
        yield loaded.images, loaded.captions  # type: ignore[misc]


def open_clip_batches(dataset: Path, size: int, batch: int, device: str) -> Iterator[Batch]:
    """open_clip_train's own pipeline over the same tars: webdataset, Pillow, its tokenizer."""
    if importlib.util.find_spec("pandas") is None:  # which its CSV data sets alone use
        sys.modules["pandas"] = ModuleType("pandas")
    from open_clip_train.data import get_wds_dataset

    options = SimpleNamespace(
        train_data="::".join(map(str, sorted(dataset.glob("*.tar")))),
        train_num_samples=1_000_000 * batch,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=batch,
        world_size=1,
        workers=len(os.sched_getaffinity(0)) if device == "cuda" else 0,
        seed=0,
    )
    transform = open_clip.image_transform(
        size, is_train=True, aug_cfg={"scale": DataConfig().crop_scale}
    )
    data = get_wds_dataset(options, transform, is_train=True, tokenizer=open_clip.tokenize)
    for images, token_ids in data.dataloader:
        yield images.to(device, non_blocking=True), token_ids


def parts_of_our_step(
    rivals: Rivals, config: ModelConfig, batch: Batch, precision
) -> dict[str, Callable[[Any], object]]:
    """Each part of our eager step on its own, forward and backward."""
    images, token_ids = batch
    model, device = rivals.model, images.device
    features = [normalize(torch.randn(len(images), config.embed_dim), dim=1) for _ in range(2)]
    leaves = [f.to(device, precision).requires_grad_() for f in features]
    scale = torch.tensor(14.3, device=device)

    def backward(call: Callable[[], Tensor], *towers: Any) -> Callable[[Any], object]:
        def run(_turn: Any) -> None:
            for tower in towers:
                tower.zero_grad()
            with torch.autocast(device.type, precision, enabled=precision is not None):
                output = call()
            output.float().sum().backward()

        return run

    return {
        "part: image tower": backward(lambda: model.encode_image(images), model.image),
        "part: text tower": backward(lambda: model.encode_text(token_ids), model.text),
        "part: loss": backward(lambda: clip_loss(*leaves, scale)),
        "part: optimizer": lambda _turn: rivals.optimizer.step(),
    }


def run(model: str, args: argparse.Namespace, device: str) -> list:
    config = configure(model)
    batch_size = args.batch or (BATCHES if device == "cuda" else CPU_BATCHES)[model]
    precision = torch.bfloat16 if args.precision == "bf16" else None
    batch, full = (draw_batch(batch_size, device, full) for full in (False, True))
    rivals = build_rivals(config, batch, precision, not args.eager)
    tokens = float((batch[1] != 0).sum(dim=1).float().mean())
    cases = []

    def add(name: str, step: Callable, prepare: Callable, tokens: float | None = None) -> None:
        extra = {"mean_tokens": tokens, "first_loss": rivals.losses.get(name)}
        cases.append(Case(name, step, prepare, batch_size, "pairs/s", extra=extra))

    for name, step in rivals.steps.items():
        add(name, step, lambda _turn: batch, tokens)
    compiled = "" if args.eager else " compiled"
    add("laclip, all captions of 77", rivals.steps["laclip"], lambda _turn: full, CONTEXT)
    if args.data:
        for name, source in (("laclip", our_batches), ("open_clip", open_clip_batches)):
            batches = source(args.data, config.vision.image_size, batch_size, device)
            best = rivals.steps[name + compiled]

            def real(_turn: Any, best: Step = best, batches: Iterator[Batch] = batches) -> None:
                best(next(batches))

            add(f"{name}{compiled}, real data", real, lambda turn: turn)
    if device == "cpu":
        a, b = (torch.randn(2048, 2048, dtype=precision) for _ in range(2))
        add(PEAK, lambda _turn: a @ b, lambda turn: turn)
    for name, part in parts_of_our_step(rivals, config, batch, precision).items():
        add(name, part, lambda turn: turn)
    records = compare(
        f"training step, {model}",
        cases,
        shape={"batch": batch_size, "image_size": config.vision.image_size, "tokens": CONTEXT},
        dtype=args.precision,
        device=device,
        seconds=args.seconds,
        clock=time.process_time,
    )
    taken = {record.name: record.median for record in records}
    peak = peak_flops(torch.cuda.get_device_name()) if device == "cuda" else None
    if device == "cpu":
        peak = 2 * 2048**3 / (1e-3 * taken[PEAK])
    for record in records:
        milliseconds, tokens = record.median, record.extra["mean_tokens"]
        record.extra["speed_up"] = None
        record.extra["peak_tflops"] = peak / 1e12 if peak else None
        whole = not record.name.startswith(("part: ", PEAK))
        if not whole:
            record.throughput = None
        elif milliseconds and taken["open_clip"]:
            record.extra["speed_up"] = taken["open_clip"] / milliseconds
        for kind, length in (("padded", CONTEXT), ("real", tokens)):
            known = whole and milliseconds and length is not None
            flops = (
                training_flops(config, length) * batch_size / (milliseconds / 1e3) if known else 0
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
    parser.add_argument(
        "--data", type=Path, help="also train on this dataset folder, each with its own loader"
    )
    parser.add_argument("--out", type=Path, help="a result file that records are added to")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # as open_clip_train, for its convolution; we have none
    for model in args.models or ([*BATCHES][:3] if gpu else ["small"]):
        records = run(model, args, "cuda" if gpu else "cpu")
        print(table(records))
        if args.out:
            append(records, args.out)


if __name__ == "__main__":
    main()
