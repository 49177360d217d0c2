"""Checkpoints of a run: complete or absent, checked before they are loaded.

    RUN/checkpoints/step_00000200/
        mp_rank_*, zero_pp_rank_*    DeepSpeed's own files
        random_rank_*.pt             generator states, one a rank
        state.json                   step, loader state, datasets, ranks, ZeRO stage, score
        manifest.json                size and XXH64 of every other file; written last

A checkpoint is written under a temporary name, synced, and renamed by the first rank. Another
number of ranks than wrote it loads it through DeepSpeed's universal form.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip import _native
from laclip.convert import read_checkpoint
from laclip.parallel import JointError, Ranks, from_first, gather_objects, raise_on_all
from laclip.whole_files import sync

_TEMPORARY = ".partial"


def require_finite(engine: Any, step: int) -> None:
    """Raise JointError where a weight is not: its checkpoint would take a sound one's place."""
    weights = (getattr(p, "ds_tensor", p) for p in engine.module.parameters())  # ZeRO-3's share
    if not all(gather_objects(all(bool(weight.isfinite().all()) for weight in weights))):
        raise JointError(
            f"the weights are no longer finite after {step} steps and are not saved; checkpoints "
            "from before stay. Lower optimizer.lr or lengthen the warm-up"
        )


def save_checkpoint(
    engine: Any, folder: Path, state: dict[str, Any], stage: int, ranks: Ranks
) -> Path:
    """Write a checkpoint of all ranks; state: what JSON can hold, with the `step`.

    Returns the checkpoint's folder. Raises JointError on every rank if any rank could not write;
    then nothing is left of it, and older checkpoints are as they were.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = folder / (final.name + _TEMPORARY)
    what = f"writing checkpoint '{final}'"
    with _jointly(what):
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    if stage == 3:
        _begin_states(engine.optimizer)
    try:
        with _errors_held_back(engine) as errors:
            engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
        with _jointly(what):
            if errors:
                raise errors[0]
            torch.save(_generator_states(), partial / f"random_rank_{ranks.rank:05d}.pt")
            if ranks.is_first:
                content = {**state, "world_size": ranks.world_size, "stage": stage}
                (partial / "state.json").write_text(json.dumps(content, indent=1))
        with _jointly(what):
            checked = _checksums(partial, _files(partial), ranks, synced=True)
        parts = gather_objects(checked)
        with _jointly(what):
            if ranks.is_first:
                manifest = {name: part[name] for part in parts for name in part}
                (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
                sync(partial / "manifest.json")
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                sync(folder)
    except JointError:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


@contextlib.contextmanager
def _jointly(what: str) -> Iterator[None]:
    """Raise JointError on every rank if on any of them a write within fails."""
    error = None
    try:
        yield
    except (OSError, RuntimeError) as failure:  # torch.save raises both for a full disk
        error = failure
    raise_on_all(error, what)


def _begin_states(zero_3: Any) -> None:
    """Give AdamW what it begins with, where it has made no update (the first were skipped).

    Without it DeepSpeed cannot make its universal form of a ZeRO-3 checkpoint.
    """
    for part in zero_3.fp32_partitioned_groups_flat:
        if not (state := zero_3.optimizer.state[part]):
            state["step"] = torch.zeros((), device=part.device)
            state |= {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}


@contextlib.contextmanager
def _errors_held_back(engine: Any) -> Iterator[list[Exception]]:
    """Collect the errors of DeepSpeed's writes.

    Raised inside its save_checkpoint, they would leave the other ranks waiting at its barriers.
    """
    errors: list[Exception] = []

    def guarded(write: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            if not errors:
                try:
                    write(*arguments, **options)
                except (OSError, RuntimeError) as error:
                    errors.append(error)

        return call

    # The second: the first rank's copies of zero_to_fp32.py and zero_to_torch.py.
    writes = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    before = [getattr(owner, name) for owner, name in writes]
    for (owner, name), write in zip(writes, before):
        setattr(owner, name, guarded(write))
    try:
        yield errors
    finally:
        for (owner, name), write in zip(writes, before):
            setattr(owner, name, write)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.glob("step_*") if folder.is_dir() else ()
    return sorted(path for path in found if path.name.removeprefix("step_").isdecimal())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was saved beside the model: `step`, `score` (None without one), ..."""
    return json.loads((checkpoint / "state.json").read_text())


def main_score(score: dict[str, float]) -> float:
    """Of a held-out task's scores the one that it is judged by."""
    return score["recall_at_1"] if "recall_at_1" in score else score["top1"]


def mean_score(scores: dict[str, dict[str, float]]) -> float | None:
    """The mean over the held-out tasks, None without any."""
    return sum(map(main_score, scores.values())) / len(scores) if scores else None


def _score(checkpoint: Path) -> float | None:
    """The score saved with it, None without one or where it is damaged."""
    try:
        return read_state(checkpoint)["score"]
    except (OSError, ValueError, KeyError, TypeError):  # told where a run would go on from it
        return None


def best_score(folder: Path) -> float:
    """The best score of a run's checkpoints, -inf where none has one."""
    scores = [_score(path) for path in list_checkpoints(folder)]
    return max((score for score in scores if score is not None), default=float("-inf"))


def newest_step(folder: Path) -> int | None:
    """The step of a run's newest checkpoint, None without one."""
    found = list_checkpoints(folder)
    return _step(found[-1]) if found else None


def prune_checkpoints(folder: Path, keep: int) -> list[str]:
    """Delete what an interrupted write left, and all but the newest `keep` and the first best.

    Returns what could not be deleted, and why.
    """
    problems = []
    for path in folder.glob(f"step_*{_TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)
    paths, best = list_checkpoints(folder), best_score(folder)
    kept = {*paths[-keep:], *[path for path in paths if _score(path) == best][:1]}
    for path in (path for path in paths if path not in kept):
        # Renamed first: a deletion that is interrupted leaves no half checkpoint.
        doomed = path.with_name(path.name + _TEMPORARY)
        try:
            path.rename(doomed)
        except OSError as error:  # protected by its owner, or deleted by hand meanwhile
            problems.append(f"the old checkpoint '{path}' is not deleted: {error}")
        shutil.rmtree(doomed, ignore_errors=True)
    return problems


def newest_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state; damaged ones are named and set aside.

    Under another name they take no newer checkpoint's place among those that are kept. Raises
    JointError where all are damaged: whether to lose the run's steps is not decided here.
    """
    for path in reversed(from_first(list_checkpoints(folder))):
        found = gather_objects(_damage(path, ranks))
        problems = list(dict.fromkeys(text for texts in found for text in texts))
        if not problems:
            return path, read_state(path)
        if ranks.is_first:
            aside = path.with_name(f"damaged_{path.name}")
            print(
                f"laclip: passing over the damaged checkpoint '{path}': {'; '.join(problems)}. "
                f"It is kept as '{aside}'"
            )
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if from_first(any(folder.glob("damaged_step_*"))):
        raise JointError(
            f"'{folder}' holds damaged checkpoints alone. Bring back a whole one, or delete them "
            "to begin anew"
        )
    return None


def add_checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        metavar="best|newest|STEP",
        help="this one's weights instead of those the run ended with; it may still go on",
    )


def find_weights(folder: Path, checkpoint: str | None = None) -> Path:
    """Where the weights of the run in `folder` are: model.pt, or the folder of a checkpoint.

    checkpoint: None for model.pt, "newest", "best" (the highest score; model.pt where that is the
    end's), or a step. Raises FileNotFoundError for one that is not there.
    """
    paths = list_checkpoints(folder / "checkpoints")
    there = f"found {', '.join(str(_step(path)) for path in paths) or 'none'}"
    if checkpoint is None:
        if not (folder / "model.pt").is_file():
            raise FileNotFoundError(
                f"'{folder}' holds no model.pt, expected the folder of a finished run (or one made "
                "by hand: a configuration as config.toml, weights of `laclip import` as model.pt). "
                f"Of one that goes on say --checkpoint newest, best or a step: {there}"
            )
        return folder / "model.pt"
    if checkpoint == "best":
        scored = [(score, path) for path in paths if (score := _score(path)) is not None]
        end, scores = folder / "model.pt", folder / "scores.json"
        text = scores.read_text() if end.is_file() and scores.is_file() else ""
        if (score := mean_score(json.loads(text or "{}"))) is not None:
            scored.append((score, end))
        paths = [max(scored, key=lambda pair: pair[0])[1]] if scored else []
        if there != "found none":
            there += "; none has a score (evaluation.every_steps and tasks give them one)"
    elif checkpoint != "newest":
        paths = [path for path in paths if str(_step(path)) == checkpoint]
    if not paths:
        raise FileNotFoundError(f"--checkpoint {checkpoint}: in '{folder}/checkpoints' {there}")
    return paths[-1]


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """The weights that find_weights found, fp32 on the CPU.

    Raises ValueError for damaged ones, FileNotFoundError for a checkpoint that the run, which goes
    on, has deleted since.
    """
    if source.is_file():
        return read_checkpoint(source, "model.pt")
    try:
        if (problems := _damage(source, Ranks(0, 1, 0, torch.device("cpu")))) and source.is_dir():
            raise ValueError(f"'{source}' is damaged: {'; '.join(problems)}. Name another one")
        return _read_engine_weights(source)
    except FileNotFoundError:
        if source.is_dir():
            raise
        raise FileNotFoundError(
            f"'{source}' was deleted by its run while it was read (checkpoint.keep). Do it again"
        ) from None


def save_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write what read_weights reads, whole or not at all. Raises OSError."""
    partial = path.with_name(path.name + _TEMPORARY)
    try:
        torch.save(weights, partial)
        sync(partial)
    except (OSError, RuntimeError) as error:  # torch's own words for a full disk do not say so
        free = shutil.disk_usage(path.parent).free // 2**20
        partial.unlink(missing_ok=True)
        raise OSError(f"writing '{path}': {error} ({free:,} MiB were free there)") from None
    partial.rename(path)
    sync(path.parent)


def _read_engine_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    if read_state(checkpoint)["stage"] < 3:
        file = checkpoint / "mp_rank_00_model_states.pt"
        return torch.load(file, map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folder, tag = str(checkpoint.parent), checkpoint.name
        return dict(get_fp32_state_dict_from_zero_checkpoint(folder, tag=tag))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def fit_checkpoint(
    path: Path, state: dict[str, Any], stage: int, ranks: Ranks
) -> contextlib.AbstractContextManager[Path]:
    """A context with the folder to load a checkpoint from on these ranks.

    It is the checkpoint's own where as many ranks wrote it, or where each holds everything (ZeRO
    stage 0); else a universal copy beside it, which is deleted at the end. Raises JointError for
    another ZeRO stage.
    """
    if state["stage"] != stage:
        raise JointError(
            f"'{path}' was written under ZeRO stage {state['stage']}, this job runs under stage "
            f"{stage}. Go on with the run under stage {state['stage']}: --deepspeed_config "
            f"configs/deepspeed/zero{state['stage']}.json"
        )
    if stage == 0 or state["world_size"] == ranks.world_size:
        return contextlib.nullcontext(path)
    return _universal_copy(path, ranks)


@contextlib.contextmanager
def _universal_copy(path: Path, ranks: Ranks) -> Iterator[Path]:
    copy = path.with_name(path.name + ".universal" + _TEMPORARY)
    error: BaseException | None = None
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(_convert, path, copy) if ranks.is_first else None
        # The others ask again and again, as no one call may wait longer than the network's timeout.
        while not from_first(job is not None and job.done()):
            time.sleep(0.1)
        if job is not None:
            error = job.exception()
    try:
        raise_on_all(error, f"converting '{path}' to {ranks.world_size} ranks")
        yield copy
        dist.barrier()
    finally:
        if ranks.is_first:
            shutil.rmtree(copy, ignore_errors=True)
            (path.parent / "latest_universal").unlink(missing_ok=True)


def _convert(path: Path, copy: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(copy, ignore_errors=True)
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    options |= {"strict": True, "inject_missing_state": True}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(
            argparse.Namespace(input_folder=str(path), output_folder=str(copy), **options)
        )


def load_checkpoint(
    engine: Any, folder: Path, path: Path, state: dict[str, Any], ranks: Ranks
) -> None:
    """Load a checkpoint, generator states included.

    folder: what fit_checkpoint gave for the checkpoint at `path`. Where the two differ the engine
    must have been set to load the universal form.
    """
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    if folder != path:
        _let_ranks_hold_nothing(engine.optimizer)
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load '{folder}'")
    if folder != path:
        # ZeRO-3 gives every group the first group's values and one `step` tensor to all states.
        for group, values in zip(engine.optimizer.param_groups, groups):
            group.update(values)
        for parameter, values in engine.optimizer.optimizer.state.items():
            values["step"] = values["step"].to(parameter.device, copy=True)
        _load_frozen_parameters(engine.module, path, state)
    own = ranks.rank % state["world_size"]
    states = torch.load(path / f"random_rank_{own:05d}.pt", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


def _let_ranks_hold_nothing(optimizer: Any) -> None:
    """Give ZeRO-1 and 2 a stand-in where this rank holds nothing of a whole group of parameters.

    The scale of the logits alone may be one. From the universal form DeepSpeed takes a group's step
    from the first parameter of which the rank holds a part, and fails without one.
    """
    if not hasattr(optimizer, "bit16_groups"):
        return

    class Nothing:
        _hp_mapping = argparse.Namespace(get_optim_state_keys=list)

        def load_hp_checkpoint_state(self, *_: Any, **__: Any) -> None:
            """No step."""

    nothing, load = Nothing(), optimizer.load_hp_checkpoint_state_from_checkpoint_dir
    optimizer.param_names[nothing] = ""
    optimizer.held_groups = [
        [p for p in group if p._hp_mapping is not None] or [nothing]
        for group in optimizer.bit16_groups
    ]
    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = lambda _, path: load(
        "held_groups", path
    )


def _load_frozen_parameters(module: torch.nn.Module, path: Path, state: dict[str, Any]) -> None:
    """What is not trained stands beside the universal form, not in it."""
    import deepspeed

    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    if not frozen:
        return
    files = sorted(path.glob("*model_states.pt"))
    parts = [torch.load(file, map_location="cpu", weights_only=False) for file in files]
    with deepspeed.zero.GatheredParameters(
        list(frozen.values()), modifier_rank=0, enabled=state["stage"] == 3
    ):
        for name, parameter in frozen.items():
            if state["stage"] == 3:
                whole = torch.cat([part["frozen_param_fragments"][name] for part in parts])
            else:
                whole = parts[0]["module"][name]
            if parameter.numel():
                parameter.data.copy_(whole.flatten()[: parameter.numel()].view_as(parameter))


def _generator_states() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    )


def _checksums(folder: Path, names: list[str], ranks: Ranks, synced: bool) -> dict[str, Any]:
    """Size and checksum of every world_size-th file, beginning with this rank's."""
    result = {}
    for name in names[ranks.rank :: ranks.world_size]:
        path = folder / name
        if synced:
            sync(path)
        size = path.stat().st_size
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
        result[name] = [size, f"{_native.xxh64(data):016x}"]
    return result


def _damage(path: Path, ranks: Ranks) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        missing = [name for name in manifest if not (path / name).is_file()]
        if missing:
            return [f"{name} is missing" for name in missing] if ranks.is_first else []
        found = _checksums(path, sorted(manifest), ranks, synced=False)
    except OSError as error:
        return [str(error)]
    except ValueError as error:  # no JSON, or bytes that are no text
        return [f"manifest.json cannot be read: {error}"]
    return [f"{name} is not as it was written" for name in found if found[name] != manifest[name]]
