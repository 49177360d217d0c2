"""Trains CLIP with caption rewrites.

deepspeed laclip/train.py --deepspeed_config configs/deepspeed/zero1.json [--config FILE]
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip.checkpoint import (
    best_score,
    main_score,
    mean_score,
    newest_checkpoint,
    newest_step,
    prune_checkpoints,
    save_weights,
)
from laclip.config import Config, add_set_option, load_config
from laclip.dataset import Dataset, check_datasets, open_dataset
from laclip.engine import check_abilities, check_zero, connect, start_engine, whole_weights
from laclip.engine_checkpoint import (
    fit_checkpoint,
    load_checkpoint,
    require_finite,
    save_checkpoint,
)
from laclip.engine_settings import engine_settings
from laclip.evaluation.held_out import check_task, evaluate, named
from laclip.flops import utilization
from laclip.loader import DataError, LoadedBatch, Loader
from laclip.metrics import (
    MetricsWriter,
    Progress,
    duration,
    import_wandb,
    json_line,
    peak_memory_mib,
    say,
    variant_names,
    variant_shares,
)
from laclip.model import CLIP, build_model, lock_towers
from laclip.model_weights import check_locks, load_weights
from laclip.optimizer import Schedule, schedule_of
from laclip.parallel import (
    FAREWELL,
    JointError,
    Ranks,
    find_ranks,
    from_first,
    gather_objects,
    meet,
    raise_on_all,
    start_sum,
)
from laclip.report import score_table, write_report
from laclip.run_folder import claim_folder, goes_on, write_status
from laclip.stop_requests import STOPS, catch_signals, stops
from laclip.tokenizer import Tokenizer, load_tokenizer
from laclip.train_step import LossScale, train_step
from laclip.watchdog import Watchdog


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed laclip/train.py",
        description="Train CLIP with caption rewrites. An unfinished run in the same folder goes "
        "on where its newest checkpoint stands; a finished one is kept under another name.",
    )
    parser.add_argument("--deepspeed_config", required=True, metavar="JSON", help="ZeRO's settings")
    parser.add_argument("--config", metavar="TOML", help="the run (default: configs/demo.toml)")
    add_set_option(parser)
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, under its own config"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    ranks = find_ranks()
    together = False  # whether all ranks end here: NCCL would wait for those that do not
    try:
        train(read_config(args), Path(args.deepspeed_config), ranks, resume=bool(args.resume))
        together = True
    except Exception as error:
        together = isinstance(error, JointError)
        if not together and not dist.is_initialized():
            with contextlib.suppress(JointError, dist.DistError):
                meet(ranks, FAREWELL, f"rank {ranks.rank} failed: {type(error).__name__}: {error}")
        if not isinstance(error, (ValueError, FileNotFoundError, DataError)):
            raise
        # Before the ranks are connected each node reports; then the first rank hears of it.
        if ranks.is_first or (ranks.local_rank == 0 and not dist.is_initialized()):
            print(f"\nlaclip: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        if together and dist.is_initialized():
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
    config = load_config(folder / "config.toml", args.set)
    return replace(config, run=replace(config.run, folder=str(folder)))


def train(config: Config, deepspeed_json: Path, ranks: Ranks, resume: bool) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    settings = engine_settings(deepspeed_json, config, ranks)
    check_abilities(config, ranks.device)
    if ranks.is_first and config.log.wandb_project:
        import_wandb()
    if not config.data.train:
        raise ValueError("data.train: no dataset given. Set it to a dataset's folder, or several")
    datasets = [open_dataset(path) for path in config.data.train]
    check_datasets(datasets, config.data, tokenizer.fingerprint)
    schedule = schedule_of(config, sum(dataset.num_samples for dataset in datasets))
    if ranks.is_first and schedule.warmup_steps >= schedule.total_steps:
        say(
            f"laclip: a warm-up of {schedule.warmup_steps:,} steps, the run makes "
            f"{schedule.total_steps:,}: it ends below optimizer.lr"
        )
    for name, task in config.evaluation.tasks.items():  # a mistake must not wait for the end
        with named(name):
            check_task(task, tokenizer)
    check_zero(settings, deepspeed_json, ranks)
    torch.manual_seed(config.run.seed)
    model = build_model(
        config.model, tokenizer.vocab_size, tokenizer.eot_token, config.train.loss == "siglip"
    )
    weights, folder = config.model.weights, Path(config.run.folder)
    # A checkpoint holds all weights: a run that goes on needs their first file no more.
    begun = goes_on(folder, resume)
    fresh = load_weights(model, weights) if weights and not begun else []
    if not begun:
        check_locks(config.model, fresh)
    connect(config, ranks)
    catch_signals()
    fingerprints = {path: d.fingerprint for path, d in zip(config.data.train, datasets)}
    read = {"deepspeed_config": settings, "fingerprint": fingerprints}
    _lock = claim_folder(folder, config, read, ranks, resume)
    lost = ValueError("its checkpoints are gone since. Start again")
    raise_on_all(lost if begun and not goes_on(folder, resume) else None, f"going on in '{folder}'")
    if ranks.is_first and fresh:
        say(f"laclip: '{weights}' holds nothing of {', '.join(fresh)}: fresh weights there")

    def give_up(reason: str, report: bool) -> None:
        """In the watchdog's thread, as the main one may wait for a rank that is no more."""
        if report:
            os.write(2, f"\nlaclip: {reason}; the job ends\n".encode())
            write_status(folder, "resumable", newest_step(folder / "checkpoints"), reason)
        os._exit(1)

    seconds, orphaned = 60 * config.run.timeout_minutes, lambda: stops.add(STOPS[-1])
    with Watchdog(ranks, seconds, give_up, orphaned) as watchdog:
        try:
            stopped = run(
                config, settings, ranks, model, fresh, tokenizer, datasets, schedule, watchdog
            )
        except Exception as error:
            if ranks.is_first:
                step = newest_step(folder / "checkpoints")
                write_status(folder, "resumable", step, str(error))
            raise
        if stopped and ranks.is_first:
            say(
                f"laclip: {stopped} in '{folder}'. To go on: deepspeed laclip/train.py "
                f"--deepspeed_config {deepspeed_json} --resume {shlex.quote(str(folder))}"
            )
        dist.barrier()  # a rank that leaves while others still talk to it can take them down


def run(
    config: Config,
    settings: dict[str, Any],
    ranks: Ranks,
    model: CLIP,
    fresh: list[str],
    tokenizer: Tokenizer,
    datasets: list[Dataset],
    schedule: Schedule,
    watchdog: Watchdog,
) -> str:
    """Train to the end ("" is returned) or until a stop is asked for (its reason).

    fresh: the parts of the model that its first weights left to begin anew.
    """
    folder = Path(config.run.folder)
    checkpoints = folder / "checkpoints"
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    found = newest_checkpoint(checkpoints, ranks)
    state: dict[str, Any] = found[1] if found else {"step": 0, "bad_samples": [], "fresh": fresh}
    fingerprints = [dataset.fingerprint for dataset in datasets]
    if found and state["datasets"] != fingerprints:
        raise JointError(
            f"'{found[0]}' was trained on other data: its datasets have the fingerprints "
            f"{state['datasets']}, {list(config.data.train)} have {fingerprints}. Restore the "
            "datasets, or start a new run with --set run.folder=..."
        )
    fresh = state.get("fresh", [])
    lock_towers(model, config.model, fresh)
    if found:
        with fit_checkpoint(*found, stage, ranks) as source:
            settings["checkpoint"] = {"load_universal": source != found[0]}
            engine = start_engine(model, config, settings, ranks)
            load_checkpoint(engine, source, *found, ranks)
    else:
        engine = start_engine(model, config, settings, ranks)
    loader = Loader(
        datasets,
        config.data,
        tokenizer,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        image_size=config.model.vision.image_size,
        context_length=config.model.text.context_length,
        pad_captions=config.model.text.pool == "last",
        device=ranks.device,
        dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start=state["step"],
        bad_samples=state["bad_samples"],
        bad_log=folder / "bad_samples.jsonl",
    )
    variants = variant_names(dataset.variants for dataset in datasets)
    batch_size = config.train.global_batch_size
    total_steps = schedule.total_steps
    step = saved_step = state["step"]
    best = from_first(best_score(checkpoints) if ranks.is_first else None)
    loss_scale = LossScale(config.train.precision, batch_size, state.get("loss_scale"))
    if ranks.is_first:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        numbers = [len(dataset.variants) for dataset in datasets]
        captions = " to ".join(map(str, sorted({min(numbers), max(numbers)})))
        captions = f"with {captions} captions each" if max(numbers) > 1 else "without rewrites"
        say(
            f"laclip: {parameters / 1e6:.1f} M parameters, {loader.num_samples:,} samples "
            f"{captions}, {total_steps} steps of {batch_size} on "
            f"{ranks.world_size} {ranks.device.type.upper()} rank(s), ZeRO-{stage}, "
            f"{config.train.precision}" + (f"; going on at step {step}" if found else "")
        )
        writer = MetricsWriter(
            folder,
            next_step=step,
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
        )
        progress = Progress(total_steps, loader.num_samples, batch_size)

    def prepare_next() -> None:
        if step + 1 < total_steps:
            watchdog.doing(f"loading batch {step + 1}")
            loader.prepare()
            watchdog.doing(f"in step {step}")

    stopped = ""
    saved_at = time.monotonic()
    skipped = 0
    while step < total_steps and not stopped:
        begin = time.perf_counter()
        watchdog.doing(f"loading batch {step}")
        batch = next(loader)
        watchdog.doing(f"in step {step}")
        found_bad = loader.take_new_bad_samples()
        minutes = (time.monotonic() - saved_at) / 60
        agreed = start_sum(
            [
                *(reason in stops for reason in STOPS),
                ranks.is_first and 0 < config.checkpoint.every_minutes <= minutes,
                len(found_bad),
                batch.substitutes,
                *np.bincount(batch.drawn_variants, minlength=len(variants)),
            ]
        )
        rate = schedule.rate(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        result = train_step(engine, batch, config, ranks, stage, loss_scale, prepare_next)
        *asked, timed, new_bad, substitutes = (counts := agreed())[: len(STOPS) + 3]
        stopped = next((reason for reason, ranks_asked in zip(STOPS, asked) if ranks_asked), "")
        if new_bad:
            for samples in gather_objects(found_bad):
                loader.mark_bad(samples)
        seconds = time.perf_counter() - begin
        if not result.applied:
            log_skipped(folder, step, result.numbers()[0], batch, loader, ranks)
        skipped = 0 if result.applied else skipped + 1
        scores: dict[str, dict[str, float]] = {}
        every = config.evaluation.every_steps
        last = step + 1 == total_steps
        if every and (step + 1) % every == 0 and not last and not stopped:
            scores, _ = score_tasks(engine, config, tokenizer, ranks, watchdog)
        if ranks.is_first and (step % config.log.every_steps == 0 or last or scores):
            loss, logit_scale = result.numbers()
            record = {
                "step": step,
                "loss": loss,
                "lr": rate,
                "logit_scale": logit_scale,
                "gradient_norm": result.gradient_norm(),
                "images_per_second": batch_size / seconds,
                "data_wait": batch.wait_seconds / seconds,
                "substitutes": substitutes,
                "bad_samples": len(loader.bad_samples),
                "memory_mib": peak_memory_mib(ranks.device),
                **utilization(
                    config.model,
                    batch.captions,
                    batch_size / seconds / ranks.world_size,
                    ranks.device,
                ),
            }
            if config.data.captions != "multi":  # which draws none: it takes them all
                drawn = np.array(counts[len(STOPS) + 3 :])
                record["variants"] = variant_shares(variants, drawn)
            if not result.applied:
                record["skipped"] = True
            if scores:
                record["scores"] = {name: main_score(score) for name, score in scores.items()}
            writer.write(record)
            progress.show(step + 1, record)
        step += 1
        if skipped >= config.train.max_skipped_steps:
            raise JointError(
                f"train.max_skipped_steps: the loss or its gradients were not finite in {skipped} "
                f"steps in a row, the last one step {step - 1} (their samples: "
                f"'{folder / 'skipped_steps.jsonl'}'). Lower optimizer.lr or lengthen the warm-up"
            )
        score = mean_score(scores)
        due = step % config.checkpoint.every_steps == 0 or step == total_steps
        if due or timed or stopped or (score is not None and score > best):
            watchdog.doing(f"saving step {step}")
            require_finite(engine, step)
            bad = {sample for part in gather_objects(loader.bad_samples) for sample in part}
            content = {"step": step, "datasets": fingerprints, "bad_samples": sorted(bad)}
            content["fresh"] = fresh
            content["loss_scale"] = loss_scale.value, loss_scale.good_steps
            saved_at = time.monotonic()
            try:
                save_checkpoint(engine, checkpoints, {**content, "score": score}, stage, ranks)
            except JointError as error:
                if ranks.is_first:
                    # torch's own words for a full disk do not say so.
                    free = shutil.disk_usage(folder).free // 2**20
                    say(
                        f"\nlaclip: {error} ({free:,} MiB are free there). The run goes on, older "
                        "checkpoints stay"
                    )
            else:
                saved_step, best = step, best if score is None else max(best, score)
                if ranks.is_first:
                    for problem in prune_checkpoints(checkpoints, config.checkpoint.keep):
                        say(f"\nlaclip: {problem}")
                    write_status(folder, "running", step)
    if ranks.is_first:
        progress.end_line()
        writer.close()
    if stopped and step < total_steps:
        if ranks.is_first:
            write_status(folder, "resumable", saved_step, stopped)
        return f"{stopped}: saved step {saved_step} of {total_steps}"
    finish(engine, model, config, tokenizer, ranks, stage, watchdog, step)
    return ""


def log_skipped(
    folder: Path, step: int, loss: float, batch: LoadedBatch, loader: Loader, ranks: Ranks
) -> None:
    """Append a skipped step to skipped_steps.jsonl, with the shard and key of its samples."""
    names = gather_objects([loader.name(int(sample)) for sample in batch.samples])
    if ranks.is_first:
        record = {"step": step, "loss": loss, "samples": [name for part in names for name in part]}
        try:
            with (folder / "skipped_steps.jsonl").open("a") as file:
                file.write(json_line(record))
        except OSError as error:
            say(f"\nlaclip: the samples of the skipped step {step} are lost: {error}")


def score_tasks(
    engine: Any, config: Config, tokenizer: Tokenizer, ranks: Ranks, watchdog: Watchdog
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, Any]]]]:
    """The scores of the held-out tasks, and examples of each."""
    scores, examples = {}, {}

    def encode(inputs: tuple[torch.Tensor | None, ...], output: int) -> torch.Tensor:
        watchdog.doing("scoring held-out data")
        return engine(*inputs)[output]

    engine.eval()
    for name, task in config.evaluation.tasks.items():
        with named(name):
            scores[name], examples[name] = evaluate(
                task,
                lambda images: encode((images, None), 0),
                lambda token_ids: encode((None, token_ids), 1),
                tokenizer,
                config.data,
                image_size=config.model.vision.image_size,
                context_length=config.model.text.context_length,
                batch_size=config.evaluation.batch_size,
                ranks=ranks,
            )
    engine.train()
    return scores, examples


def finish(
    engine: Any,
    model: CLIP,
    config: Config,
    tokenizer: Tokenizer,
    ranks: Ranks,
    stage: int,
    watchdog: Watchdog,
    step: int,
) -> None:
    """Write the weights, score the held-out sets, write the report."""
    folder = Path(config.run.folder)
    watchdog.doing("writing the weights")
    weights = whole_weights(model, stage, ranks)
    if ranks.is_first:
        save_weights(weights, folder / "model.pt")
    del weights
    begin = time.perf_counter()
    scores, examples = score_tasks(engine, config, tokenizer, ranks, watchdog)
    if not ranks.is_first:
        return
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (folder / "examples.json").write_text(json.dumps(examples) + "\n")
    write_status(folder, "finished", step)
    page = write_report(folder)
    if scores:
        say(f"laclip: held-out scores ({duration(time.perf_counter() - begin)})")
        say(score_table(scores))
    say(f"laclip: weights, scores and report in '{folder}'; open {page}")


if __name__ == "__main__":
    sys.exit(main())
