"""DeepSpeed's engine into a checkpoint and out of it.

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

from laclip.checkpoint import TEMPORARY, checksums
from laclip.parallel import JointError, Ranks, from_first, gather_objects, raise_on_all
from laclip.whole_files import sync


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
    partial = folder / (final.name + TEMPORARY)
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
            checked = checksums(partial, _files(partial), ranks, synced=True)
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
    copy = path.with_name(path.name + ".universal" + TEMPORARY)
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
