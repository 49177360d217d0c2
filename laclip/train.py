"""Trains CLIP with caption rewrites.

deepspeed laclip/train.py --deepspeed_config configs/deepspeed/zero1.json [--config FILE]
"""

import argparse
import datetime
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from laclip.config import Config, load_config
from laclip.dataset import open_dataset
from laclip.engine_settings import engine_settings
from laclip.evaluation import evaluate
from laclip.kernels import clip_loss, siglip_loss
from laclip.loader import DataError, LoadedBatch, Loader
from laclip.metrics import MetricsWriter, Progress, duration, variant_shares
from laclip.model import CLIP, build_model, compile_blocks, load_weights
from laclip.optimizer import build_optimizer, learning_rate
from laclip.parallel import Ranks, find_ranks, from_first, gather_objects
from laclip.report import write_report
from laclip.run_folder import claim_folder, write_status
from laclip.tokenizer import Tokenizer, load_tokenizer

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that waits longer for the others gives up
stop_reasons: list[str] = []  # set by signals, agreed upon by all ranks after each step


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed laclip/train.py",
        description="Train CLIP with caption rewrites. An unfinished run in the same folder goes "
        "on where its newest checkpoint stands; a finished one is kept under another name.",
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="ZeRO's settings")
    parser.add_argument("--config", metavar="TOML", help="the run (default: configs/demo.toml)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key of the configuration, e.g. --set optimizer.lr=5e-4; may be repeated",
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, under its own config"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    ranks = find_ranks()
    try:
        train(read_config(args), Path(args.deepspeed_config), ranks, resume=bool(args.resume))
        dist.barrier()  # a rank that leaves while others still talk to it can take them down
    except (ValueError, FileNotFoundError, DataError) as error:
        # Before the ranks are connected all of them find the same mistake: one reports it.
        if ranks.is_first or dist.is_initialized():
            print(f"\nlaclip: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def read_config(args: argparse.Namespace) -> Config:
    if args.resume is None:
        return load_config(args.config or "configs/demo.toml", args.set)
    if args.config is not None:
        raise ValueError("--resume: the run's own config.toml is used; leave out --config")
    folder = Path(args.resume)
    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(f"--resume: {args.resume!r} is no run folder: no config.toml there")
    return load_config(folder / "config.toml", [*args.set, f'run.folder="{folder}"'])


def train(config: Config, deepspeed_json: Path, ranks: Ranks, resume: bool) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    settings = engine_settings(deepspeed_json, config, ranks)
    if not config.data.train:
        raise ValueError("data.train: no dataset given. Set it to a dataset's folder, or several")
    datasets = [open_dataset(path) for path in config.data.train]
    variants = max((dataset.variants for dataset in datasets), key=len)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    torch.manual_seed(config.run.seed)
    model = build_model(
        config.model, tokenizer.vocab_size, tokenizer.eot_token, config.train.loss == "siglip"
    )
    if config.model.weights:
        load_weights(model, config.model.weights)

    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        built = Path(sys.prefix) / "torch_extensions"  # by requirements/build_deepspeed_op.py
        if built.is_dir():
            os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))
        if "OMP_NUM_THREADS" not in os.environ:
            here = int(os.environ.get("LOCAL_SIZE", ranks.world_size))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed  # slow to import: mistakes are reported before

    deepspeed.init_distributed(
        "nccl" if ranks.device.type == "cuda" else "gloo", timeout=TIMEOUT, verbose=False
    )
    catch_signals()
    folder = Path(config.run.folder)
    _lock = claim_folder(folder, config, ranks, resume)
    found = newest_checkpoint(folder / "checkpoints", ranks)
    state: dict[str, Any] = found[1] if found else {"step": 0, "bad_samples": []}
    fingerprints = [dataset.fingerprint for dataset in datasets]
    if found and state["datasets"] != fingerprints:
        raise ValueError(
            f"'{found[0]}' was trained on other data: its datasets have the fingerprints "
            f"{state['datasets']}, {list(config.data.train)} have {fingerprints}. Restore the "
            "datasets, or start a new run with --set run.folder=..."
        )
    model.to(ranks.device)
    if config.train.precision != "fp32":
        # Under autocast inside the engine parameters stay fp32, logit_scale among them: the
        # engine's own bf16 would round it by up to 3 %.
        precision = {"bf16": torch.bfloat16}[config.train.precision]
        model.forward = torch.autocast(ranks.device.type, precision)(model.forward)  # type: ignore
    if config.train.compile:
        compile_blocks(model)
    optimizer = build_optimizer(
        model,
        learning_rate=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        layer_decay=config.optimizer.layer_decay,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if found:
        load_checkpoint(engine, *found, ranks)

    loader = Loader(
        datasets,
        config.data,
        tokenizer,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        device=ranks.device,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=state["step"],
        bad_samples=state["bad_samples"],
        bad_log=folder / "bad_samples.jsonl",
    )
    batch_size = config.train.global_batch_size
    total_steps = config.train.steps or round(config.train.epochs * loader.num_samples / batch_size)
    warmup_steps = config.optimizer.warmup_steps or round(
        config.optimizer.warmup_epochs * loader.num_samples / batch_size
    )
    if total_steps < 1:
        raise ValueError(
            f"train.epochs, train.steps: {loader.num_samples} samples in batches of {batch_size} "
            f"for {config.train.epochs:g} epochs make no step. Give more of either"
        )
    step = state["step"]
    if ranks.is_first:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        print(
            f"laclip: {parameters / 1e6:.1f} M parameters, {loader.num_samples:,} samples with "
            f"{len(variants)} captions each, {total_steps} steps of {batch_size} on "
            f"{ranks.world_size} {ranks.device.type.upper()} rank(s), ZeRO-{stage}, "
            f"{config.train.precision}" + (f"; going on at step {step}" if found else ""),
            flush=True,
        )
        writer = MetricsWriter(
            folder,
            next_step=step,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
        )
        progress = Progress(total_steps, loader.num_samples, batch_size)

    def save() -> None:
        bad = sorted({sample for part in gather_objects(loader.bad_samples) for sample in part})
        content = {"step": step, "datasets": fingerprints, "bad_samples": bad}
        save_checkpoint(engine, folder / "checkpoints", content, ranks)
        if ranks.is_first:
            prune_checkpoints(folder / "checkpoints", config.checkpoint.keep)
            write_status(folder, "running", step)

    stopped = ""
    saved_at, saved_step = time.monotonic(), step
    skipped = 0
    while step < total_steps:
        begin = time.perf_counter()
        batch = next(loader)
        rate = learning_rate(
            step,
            peak=config.optimizer.lr,
            start=config.optimizer.start_lr,
            end=config.optimizer.end_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        loss, logit_scale, norm, finite = train_step(engine, batch, config, ranks, stage)
        skipped = 0 if finite else skipped + 1
        news = gather_objects(
            (
                loader.take_new_bad_samples(),
                (stop_reasons or [""])[0],
                batch.substitutes,
                np.bincount(batch.drawn_variants, minlength=len(variants)),
            )
        )
        for found_bad, reason, *_ in news:
            loader.mark_bad(found_bad)
            stopped = stopped or reason
        seconds = time.perf_counter() - begin
        if ranks.is_first and (step % config.log.every_steps == 0 or step + 1 == total_steps):
            record = {
                "step": step,
                "loss": loss,
                "lr": rate,
                "logit_scale": logit_scale,
                "gradient_norm": norm,
                "images_per_second": batch_size / seconds,
                "data_wait": batch.wait_seconds / seconds,
                "substitutes": sum(count for _, _, count, _ in news),
                "bad_samples": len(loader.bad_samples),
                "variants": variant_shares(variants, sum(drawn for *_, drawn in news)),
                "memory_mib": peak_memory_mib(ranks),
            }
            if not finite:
                record["skipped"] = True
            writer.write(record)
            progress.show(step + 1, record)
        step += 1
        if skipped >= config.train.max_skipped_steps:
            raise DataError(
                f"train.max_skipped_steps: the loss was not finite in {skipped} steps in a row, "
                f"the last one step {step - 1}. Lower optimizer.lr or lengthen the warm-up"
            )
        minutes = (time.monotonic() - saved_at) / 60
        timed = config.checkpoint.every_minutes > 0 and minutes >= config.checkpoint.every_minutes
        due = step % config.checkpoint.every_steps == 0 or step == total_steps
        if due or stopped or from_first(timed):
            save()
            saved_at, saved_step = time.monotonic(), step
        if stopped:
            break
    if ranks.is_first:
        progress.end_line()
        writer.close()
    if stopped and step < total_steps:
        if ranks.is_first:
            write_status(folder, "resumable", saved_step, stopped)
            print(
                f"laclip: {stopped}: saved step {saved_step} of {total_steps} in '{folder}'. To go "
                f"on: deepspeed laclip/train.py --deepspeed_config {deepspeed_json} --resume "
                f"{folder}",
                flush=True,
            )
        return
    finish(engine, model, config, tokenizer, ranks, stage, folder, step)


def train_step(
    engine: Any, batch: LoadedBatch, config: Config, ranks: Ranks, stage: int
) -> tuple[float, float, float, bool]:
    """One update: (loss, logit_scale, gradient norm, whether all ranks' losses were finite)."""
    group = dist.group.WORLD if ranks.world_size > 1 else None
    options = {"group": group, "implementation": config.train.loss_implementation}
    tokens = batch.token_ids
    keys = torch.from_numpy(batch.samples.view("int64")).to(ranks.device) ^ batch.index
    size = config.train.micro_batch_size or len(batch.images)
    parts = [slice(i, i + size) for i in range(0, len(batch.images), size)]

    def forward(part: slice) -> tuple[torch.Tensor, ...]:
        return engine(batch.images[part], tokens[..., part, :], keys[part])

    def loss_of(images: torch.Tensor, texts: torch.Tensor, *scale: torch.Tensor) -> torch.Tensor:
        if config.train.loss == "siglip":
            return siglip_loss(images, texts, *scale, **options)
        return clip_loss(
            images, texts, *scale, label_smoothing=config.train.label_smoothing, **options
        )

    if len(parts) == 1:
        outputs = forward(parts[0])
        loss = loss_of(*outputs)
        logit_scale = outputs[2]
    else:
        # Feature caching: the features of all micro-batches first, one loss over all of them,
        # then the backward micro-batch by micro-batch: exactly the gradients of the large batch.
        with torch.no_grad():
            cached = [forward(part) for part in parts]
        leaves = [
            torch.cat([outputs[0] for outputs in cached]),
            torch.cat([outputs[1] for outputs in cached], dim=-2),
            *cached[0][2:],
        ]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        loss = loss_of(*leaves)
        logit_scale = leaves[2]
    number = loss.detach().float().reshape(1).clone()
    dist.all_reduce(number)
    mean_loss = number.item() / ranks.world_size
    if not torch.isfinite(number).all():
        return mean_loss, logit_scale.item(), float("nan"), False
    if len(parts) == 1:
        engine.backward(loss)
        norm = gradient_norm_before_step(engine, stage)
        engine.step()
    else:
        loss.backward()
        gradients: list[Any] = [leaf.grad for leaf in leaves]
        image_gradient, text_gradient, *scale_gradients = gradients
        for part in parts:
            images, texts, *scales = forward(part)
            surrogate = (images * image_gradient[part]).sum()
            surrogate = surrogate + (texts * text_gradient[..., part, :]).sum()
            for scale, gradient in zip(scales, scale_gradients):
                surrogate = surrogate + scale * gradient / len(parts)
            engine.backward(surrogate, scale_wrt_gas=False)
            norm = gradient_norm_before_step(engine, stage)
            engine.step()
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    return mean_loss, logit_scale.item(), norm, True


def gradient_norm_before_step(engine: Any, stage: int) -> float | None:
    """Plain data parallelism keeps no norm: it is taken from the averaged gradients."""
    if stage > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def finish(
    engine: Any,
    model: CLIP,
    config: Config,
    tokenizer: Tokenizer,
    ranks: Ranks,
    stage: int,
    folder: Path,
    step: int,
) -> None:
    """Write the weights, score the held-out sets, write the report."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        if ranks.is_first:
            torch.save(
                {name: p.detach().cpu() for name, p in model.state_dict().items()},
                folder / "model.pt",
            )
    engine.eval()
    scores, examples = {}, {}
    begin = time.perf_counter()
    for name, task in config.evaluation.tasks.items():
        scores[name], examples[name] = evaluate(
            task,
            lambda images: engine(images, None)[0],
            lambda token_ids: engine(None, token_ids)[1],
            tokenizer,
            config.data,
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
            batch_size=config.evaluation.batch_size,
            ranks=ranks,
        )
    if not ranks.is_first:
        return
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (folder / "examples.json").write_text(json.dumps(examples) + "\n")
    write_status(folder, "finished", step)
    page = write_report(folder)
    if scores:
        print(f"laclip: held-out scores ({duration(time.perf_counter() - begin)})")
        print(score_table(scores))
    print(f"laclip: weights, scores and report in '{folder}'; open {page}", flush=True)


def score_table(scores: dict[str, dict[str, float]]) -> str:
    lines = [f"  {'set':18}{'measure':26}{'score':>8}{'at 5':>8}{'chance':>9}{'n':>7}"]
    for name, score in scores.items():
        texts = "recall_at_1" in score
        first, fifth = ("recall_at_1", "recall_at_5") if texts else ("top1", "top5")
        measure = "text to image, recall" if texts else "image to text, top-1"
        lines.append(
            f"  {name:18}{measure:26}{score[first]:8.1%}{score[fifth]:8.1%}"
            f"{score['chance']:9.2%}{score['n']:7}"
        )
    return "\n".join(lines)


def catch_signals() -> None:
    """The first SIGINT or SIGTERM asks for a checkpoint and an end; more of them change nothing."""

    def remember(number: int, _frame: Any) -> None:
        stop_reasons.append(f"stopped by {signal.Signals(number).name}")

    signal.signal(signal.SIGINT, remember)
    signal.signal(signal.SIGTERM, remember)


def peak_memory_mib(ranks: Ranks) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranks.device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    sys.exit(main())
