"""Checkpoints of a run: complete or absent, checked before they are loaded.

    RUN/checkpoints/step_00000200/
        mp_rank_*, zero_pp_rank_*    DeepSpeed's own files
        random_rank_*.pt             generator states, one a rank
        state.json                   step, loader state, datasets, ranks
        manifest.json                size and XXH64 of every other file; written last

A checkpoint is written under a temporary name, synced, and renamed by the first rank.
"""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip import _native
from laclip.parallel import Ranks, from_first, gather_objects, raise_on_all

_TEMPORARY = ".partial"


def save_checkpoint(engine: Any, folder: Path, state: dict[str, Any], ranks: Ranks) -> Path:
    """Write a checkpoint of all ranks; state: what JSON can hold, with the `step`.

    Returns the checkpoint's folder. Raises on every rank if any rank fails.
    """
    final = folder / f"step_{state['step']:08d}"
    partial = folder / (final.name + _TEMPORARY)
    if ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    error: BaseException | None = None
    checked: dict[str, Any] = {}
    try:
        engine.save_checkpoint(str(folder), tag=partial.name, save_latest=False)
        torch.save(_generator_states(), partial / f"random_rank_{ranks.rank:05d}.pt")
        if ranks.is_first:
            text = json.dumps({**state, "world_size": ranks.world_size}, indent=1)
            (partial / "state.json").write_text(text)
        dist.barrier()
        checked = _checksums(partial, _files(partial), ranks, sync=True)
    except OSError as failure:
        error = failure
    raise_on_all(error, f"writing checkpoint '{final}'")
    parts = gather_objects(checked)
    if ranks.is_first:
        try:
            _write_synced(
                partial / "manifest.json",
                json.dumps({name: part[name] for part in parts for name in part}, indent=1),
            )
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync_folder(folder)
        except OSError as failure:
            error = failure
    raise_on_all(error, f"writing checkpoint '{final}'")
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.glob("step_*") if folder.is_dir() else ()
    return sorted(path for path in found if path.suffix != _TEMPORARY)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and what an interrupted write left."""
    for path in folder.glob(f"step_*{_TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(folder)[:-keep]:
        # Renamed first: a deletion that is interrupted leaves no half checkpoint.
        doomed = path.with_name(path.name + _TEMPORARY)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def newest_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state; damaged ones are named and passed over."""
    for path in reversed(from_first(list_checkpoints(folder))):
        problems = [text for texts in gather_objects(_damage(path, ranks)) for text in texts]
        if not problems:
            return path, json.loads((path / "state.json").read_text())
        if ranks.is_first:
            print(f"laclip: passing over the damaged checkpoint '{path}': {'; '.join(problems)}")
    return None


def load_checkpoint(engine: Any, path: Path, state: dict[str, Any], ranks: Ranks) -> None:
    """Load a checkpoint that newest_checkpoint gave, generator states included."""
    if state["world_size"] != ranks.world_size:
        raise ValueError(
            f"'{path}' was written by {state['world_size']} ranks, this job has "
            f"{ranks.world_size}. Start it with {state['world_size']}: deepspeed --num_gpus "
            f"{state['world_size']} ..."
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed could not load '{path}'")
    states = torch.load(path / f"random_rank_{ranks.rank:05d}.pt", weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])


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


def _checksums(folder: Path, names: list[str], ranks: Ranks, sync: bool) -> dict[str, Any]:
    """Size and checksum of every world_size-th file, beginning with this rank's."""
    result = {}
    for name in names[ranks.rank :: ranks.world_size]:
        path = folder / name
        if sync:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
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
        found = _checksums(path, sorted(manifest), ranks, sync=False)
    except (OSError, json.JSONDecodeError) as error:
        return [str(error)]
    return [f"{name} is not as it was written" for name in found if found[name] != manifest[name]]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
