"""Checkpoints of a run: complete or absent, checked before they are loaded.

    RUN/checkpoints/step_00000200/
        mp_rank_*, zero_pp_rank_*    DeepSpeed's own files
        random_rank_*.pt             generator states, one a rank
        state.json                   step, loader state, datasets, what began anew, ranks,
                                     ZeRO stage, score
        manifest.json                size and XXH64 of every other file; written last

Which there are, which are kept, and their weights; `engine_checkpoint` writes and loads them.
"""

import argparse
import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laclip import _native
from laclip.convert import read_checkpoint
from laclip.parallel import JointError, Ranks, from_first, gather_objects
from laclip.whole_files import sync, whole_file

TEMPORARY = ".partial"


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
    for path in folder.glob(f"step_*{TEMPORARY}"):
        shutil.rmtree(path, ignore_errors=True)
    paths, best = list_checkpoints(folder), best_score(folder)
    kept = {*paths[-keep:], *[path for path in paths if _score(path) == best][:1]}
    for path in (path for path in paths if path not in kept):
        # Renamed first: a deletion that is interrupted leaves no half checkpoint.
        doomed = path.with_name(path.name + TEMPORARY)
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
    try:
        with whole_file(path) as file:
            torch.save(weights, file)
    except (OSError, RuntimeError) as error:  # torch's own words for a full disk do not say so
        size = sum(tensor.nbytes for tensor in weights.values()) // 2**20
        free = shutil.disk_usage(path.parent).free // 2**20
        raise OSError(
            f"writing '{path}': {error} ({size:,} MiB to write, {free:,} MiB were free there)"
        ) from None


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


def checksums(folder: Path, names: list[str], ranks: Ranks, synced: bool) -> dict[str, Any]:
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
        found = checksums(path, sorted(manifest), ranks, synced=False)
    except OSError as error:
        return [str(error)]
    except ValueError as error:  # no JSON, or bytes that are no text
        return [f"manifest.json cannot be read: {error}"]
    return [f"{name} is not as it was written" for name in found if found[name] != manifest[name]]
