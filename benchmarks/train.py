"""Training steps a second against open_clip's, on the same weights, images and captions.

python requirements/oracles.py benchmarks/train.py [--models vit_b_32 ...] [--batch 32]
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize

from laclip.config import PRESETS, ModelConfig, TextConfig, VisionConfig
from laclip.convert import to_laclip
from laclip.kernels import clip_loss
from laclip.model import build_model, compile_blocks, training_flops
from laclip.optimizer import build_optimizer

VOCABULARY, EOT, CONTEXT = 49408, 49407, 77
MODELS = ("vit_b_32", "vit_b_16", "vit_l_14")
# A model that two CPU cores can train: half of open_clip's ViT-S-32-alt in depth.
SMALL = {
    "embed_dim": 256,
    "vision": {"patch_size": 32, "width": 384, "depth": 6, "heads": 6},
    "text": {"width": 256, "depth": 6, "heads": 4},
}
H100_BF16_FLOPS = 989e12  # dense, NVIDIA's data sheet
ADAMW = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}


def configure(model: str) -> ModelConfig:
    values = PRESETS.get(model, SMALL)
    return ModelConfig(
        embed_dim=values["embed_dim"],
        vision=VisionConfig(**values["vision"]),
        text=TextConfig(**values["text"]),
    )


def original(config: ModelConfig) -> torch.nn.Module:
    """open_clip's model of the same architecture."""

    def part(tower) -> dict:
        return {"layers": tower.depth, "width": tower.width}

    head_width = config.vision.width // config.vision.heads
    vision = {"head_width": head_width, "patch_size": config.vision.patch_size}
    text = {"heads": config.text.heads, "vocab_size": VOCABULARY}
    return open_clip.model.CLIP(
        config.embed_dim, part(config.vision) | vision, part(config.text) | text
    )


def draw_batch(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images, and captions of 20 +- 8 tokens (web alt-text; PERFORMANCE counts 20)."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    lengths = (torch.randn(batch, generator=generator) * 8 + 20).clamp(5, CONTEXT).round().int()
    token_ids = torch.zeros(batch, CONTEXT, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        ids = torch.randint(1, EOT - 1, (length - 2,), generator=generator)
        token_ids[row, :length] = torch.tensor([EOT - 1, *ids.tolist(), EOT])
    return images.to(device), token_ids


def our_step(model, images: Tensor, token_ids: Tensor, precision) -> Callable[[], Tensor]:
    device = images.device.type
    optimizer = build_optimizer(model, learning_rate=5e-4, **ADAMW)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, precision, enabled=precision is not None):
            image_features, text_features, logit_scale = model(images, token_ids)
        loss = clip_loss(image_features, text_features, logit_scale)
        loss.backward()
        optimizer.step()
        return loss

    return step


def open_clip_step(model, images: Tensor, token_ids: Tensor, precision) -> Callable[[], Tensor]:
    """What open_clip_train does in a step: its loss, AdamW as it sets it, the scale clamped."""
    device = images.device.type
    token_ids = token_ids.long().to(device)
    groups: list[dict] = [{"params": [], "weight_decay": wd} for wd in (0.0, 0.2)]
    for parameter in model.parameters():
        groups[parameter.ndim >= 2]["params"].append(parameter)
    options = {name: value for name, value in ADAMW.items() if name != "weight_decay"}
    optimizer = torch.optim.AdamW(groups, lr=5e-4, **options)
    loss_function = open_clip.ClipLoss()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, precision, enabled=precision is not None):
            loss = loss_function(*model(images, token_ids))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss

    return step


def timed(step: Callable[[], Tensor], device: str) -> float:
    """Seconds of one call: CUDA events on a GPU; on a CPU those that the process computed.

    With one thread (OMP_NUM_THREADS=1) that is the wall clock of a core of one's own; others at
    work on the machine stretch the wall clock, not this.
    """
    if device == "cpu":
        begin = time.process_time()
        step()
        return time.process_time() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    step()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def peak_memory_mib(step: Callable[[], Tensor], device: str) -> float | None:
    """Peak of one step on a GPU; a CPU keeps no such count."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def build_steps(
    config: ModelConfig, images: Tensor, token_ids: Tensor, precision, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """The rivals' steps, all from the same weights."""
    device = images.device
    torch.manual_seed(0)
    theirs = original(config).to(device)
    weights = to_laclip(theirs.state_dict())
    padded = token_ids.clone()  # ours on captions that fill the context: nothing to pack
    padded[:, :-1] = padded[:, :-1].where(padded[:, :-1] != EOT, 1).clamp(min=1)
    padded[:, -1] = EOT
    steps = {}
    for name, ids, graph in (
        ("laclip", token_ids, False),
        ("laclip, padded", padded, False),
        ("laclip compiled", token_ids, True),
    ):
        if graph and not compiled:
            continue
        model = build_model(config, VOCABULARY, EOT)
        model.load_state_dict(weights)
        model.to(device)
        if graph:
            compile_blocks(model)
        steps[name] = our_step(model, images, ids, precision)
    steps["open_clip"] = open_clip_step(theirs, images, token_ids, precision)
    if compiled:
        twin = original(config).to(device)
        twin.load_state_dict(theirs.state_dict())
        steps["open_clip compiled"] = open_clip_step(
            torch.compile(twin), images, token_ids, precision
        )
    return steps


def check(steps: dict[str, Callable[[], Tensor]], precision) -> dict[str, float]:
    """The first step's losses, which must agree: same weights, same batch."""
    losses = {name: step().item() for name, step in steps.items()}
    tolerance = 1e-4 if precision is None else 2e-2
    for name, loss in losses.items():
        if name != "laclip, padded" and abs(loss - losses["open_clip"]) > tolerance:
            raise SystemExit(f"{name} disagrees with open_clip: {losses}; nothing is reported")
    return losses


def breakdown(config: ModelConfig, images: Tensor, token_ids: Tensor, precision) -> dict:
    """Milliseconds of the parts of our eager step, each forward and backward on its own."""
    device = images.device.type
    model = build_model(config, VOCABULARY, EOT).to(images.device)
    optimizer = build_optimizer(model, learning_rate=5e-4, **ADAMW)
    features = [normalize(torch.randn(len(images), config.embed_dim), dim=1) for _ in range(2)]
    leaves = [f.to(images.device, precision).requires_grad_() for f in features]

    def under_autocast(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast(device, precision, enabled=precision is not None):
                output = call()
            output.float().sum().backward()
            return output

        return run

    parts = {
        "image tower": under_autocast(lambda: model.encode_image(images)),
        "text tower": under_autocast(lambda: model.encode_text(token_ids)),
        "loss": under_autocast(lambda: clip_loss(*leaves, torch.tensor(14.3).to(images.device))),
        "optimizer": lambda: optimizer.step() or leaves[0],
    }
    times = {}
    for name, part in parts.items():
        part()
        times[name] = 1e3 * statistics.median(timed(part, device) for _ in range(5))
    return times


def machine() -> dict:
    """Where and with what this runs."""
    model_name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model_name = next((s.split(": ")[1] for s in lines if s.startswith("model name")), "")
    versions = {"python": platform.python_version(), "open_clip_torch": open_clip.__version__}
    for package in ("torch", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    driver = None
    if gpu:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return {
        "machine": f"{model_name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "gpu": gpu,
        "driver": driver,
        "versions": versions,
        "commit": commit.stdout.strip(),
    }


def run(model: str, batch: int, precision, rounds: int, compiled: bool, device: str) -> list[dict]:
    config = configure(model)
    images, token_ids = draw_batch(batch, device)
    steps = build_steps(config, images, token_ids, precision, compiled)
    losses = check(steps, precision)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            times[name].append(timed(step, device))
    mean_tokens = float((token_ids != 0).sum(dim=1).float().mean())
    records = []
    for name, step in steps.items():
        seconds = sorted(times[name][1:])
        median = statistics.median(seconds)
        record = {
            "name": f"train step, {model}, {name}",
            "shape": {"batch": batch, "image_size": 224, "tokens": CONTEXT},
            "mean_caption_tokens": CONTEXT if name == "laclip, padded" else mean_tokens,
            "dtype": str(precision or torch.float32).removeprefix("torch."),
            "median_ms": 1e3 * median,
            "p20_ms": 1e3 * seconds[int(0.2 * (len(seconds) - 1))],
            "p80_ms": 1e3 * seconds[math.ceil(0.8 * (len(seconds) - 1))],
            "rounds": rounds,
            "throughput": batch / median,
            "throughput_unit": "pairs/s",
            "peak_memory_mib": peak_memory_mib(step, device),
            "first_loss": losses[name],
        }
        if device == "cuda":
            for key, tokens in (("mfu_padded", None), ("mfu_real", record["mean_caption_tokens"])):
                flops = training_flops(config, tokens) * batch / median
                record[key] = flops / H100_BF16_FLOPS
        records.append(record)
    del steps
    parts = breakdown(config, images, token_ids, precision)
    records.append({"name": f"train step, {model}, parts of laclip's", "parts_ms": parts})
    return records


def table(records: list[dict]) -> str:
    lines = [
        "| step | median ms | p20-p80 | pairs/s | against open_clip |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        if "parts_ms" in record:
            parts = ", ".join(f"{name} {ms:.0f}" for name, ms in record["parts_ms"].items())
            lines.append(f"\nparts, ms: {parts}\n")
            continue
        prefix = record["name"].rsplit(", laclip", 1)[0].rsplit(", open_clip", 1)[0]
        rival = next(r for r in records if r["name"] == f"{prefix}, open_clip")
        lines.append(
            f"| {record['name'].removeprefix('train step, ')} | {record['median_ms']:.0f} | "
            f"{record['p20_ms']:.0f}-{record['p80_ms']:.0f} | {record['throughput']:.1f} | "
            f"{rival['median_ms'] / record['median_ms']:.2f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=[*MODELS, "small"])
    parser.add_argument("--batch", type=int, help="default: by model, for 80 GB or two cores")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32")
    parser.add_argument("--rounds", type=int, default=20 if gpu else 7)
    parser.add_argument("--eager", action="store_true", help="leave out the compiled steps")
    parser.add_argument("--out", type=Path, help="a JSON file for the records")
    args = parser.parse_args()
    batches = {"vit_b_32": 1024, "vit_b_16": 512, "vit_l_14": 192, "small": 32}
    precision = torch.bfloat16 if args.precision == "bf16" else None
    records = []
    for model in args.models or (list(MODELS) if gpu else ["small"]):
        batch = args.batch or batches[model]
        device = "cuda" if gpu else "cpu"
        records += run(model, batch, precision, args.rounds, not args.eager, device)
    here = machine()
    print(json.dumps(here, indent=1))
    print(table(records))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps([here | record for record in records], indent=1) + "\n")


if __name__ == "__main__":
    main()
