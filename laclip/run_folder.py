"""A run's folder: whose it is, what state the run in it is in.

status.json says `running`, `finished` or `resumable`, with the step and the reason. A job that was
killed leaves `running` behind; the lock tells whether one is.
"""

import datetime
import fcntl
import json
from pathlib import Path
from typing import Any

from laclip.checkpoint import newest_step
from laclip.config import Config, differences, load_config
from laclip.metrics import say
from laclip.parallel import JointError, Ranks, from_first, raise_on_all
from laclip.typed_toml import dump, flatten
from laclip.whole_files import whole_file

_FIRST = {".lock", "config.toml.partial"}  # all that a full disk may leave of a start


def claim_folder(
    folder: Path, config: Config, read: dict[str, Any], ranks: Ranks, resume: bool
) -> Any:
    """Decide what the run's folder means for this run; all ranks agree. Returns the held lock.

    read: what the ranks have read beside the configuration, which must be the same on all.
    """
    _require_alike(flatten(config) | flatten(read))
    error, lock = None, None
    if ranks.is_first:
        try:
            lock = open_folder(folder, config, resume)
        except ValueError as failure:
            error = str(failure)
        except OSError as failure:
            error = f"run.folder: '{folder}' cannot be used: {failure}"
    error = from_first(error)
    if error is not None:
        raise JointError(error)
    return lock


def _require_alike(own: dict[str, Any]) -> None:
    """Raise JointError where a rank read another file than the first: each would train its own."""
    first = from_first(own)
    changed = [
        f"{key} is {own.get(key)!r}, on rank 0 {first.get(key)!r}"
        for key in sorted(own.keys() | first.keys())
        if own.get(key) != first.get(key)
    ]
    raise_on_all(ValueError("; ".join(changed)) if changed else None, "comparing configurations")


def goes_on(folder: Path, resume: bool) -> bool:
    """Whether a start in the folder goes on from a checkpoint, or tells that all are damaged."""
    checkpoints = folder / "checkpoints"
    try:
        found = newest_step(checkpoints) is not None or any(checkpoints.glob("damaged_step_*"))
        return found and _keeps(folder, resume)
    except OSError:  # claim_folder tells
        return False


def _keeps(folder: Path, resume: bool) -> bool:
    """Whether a run in the folder stays there: a finished one is moved away unless it is named."""
    return resume or _read_status(folder).get("state") != "finished"


def open_folder(folder: Path, config: Config, resume: bool) -> Any:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run.folder: '{folder}' is a file, expected a folder or nothing")
    status = _read_status(folder)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not _keeps(folder, resume):
        _take_lock(folder).close()  # held while a job still writes its report
        number = 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        kept = folder.rename(folder.with_name(f"{folder.name}.{number}"))
        print(f"laclip: the finished run in '{folder}' is kept as '{kept}'")
    elif found - _FIRST and "config.toml" not in found:
        raise ValueError(
            f"run.folder: '{folder}' holds files but no run. Choose another: --set run.folder=..."
        )
    folder.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(folder)
    stored = folder / "config.toml"
    if stored.exists():
        changed = differences(load_config(stored), config)
        begun = status.get("step") is not None or found & {"metrics.jsonl", "checkpoints"}
        if changed and begun:
            raise ValueError(
                f"run.folder: '{folder}' holds an unfinished run of another configuration "
                f"({'; '.join(changed)}). Go on with it (--resume {folder}), or choose another "
                "folder: --set run.folder=..."
            )
    with whole_file(stored, folder / "config.toml.partial") as file:
        file.write(dump(config).encode())
    write_status(folder, "running", None)
    return lock


def _take_lock(folder: Path) -> Any:
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"run.folder: another job is running in '{folder}'") from None
    return lock


def _read_status(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "status.json").read_text())
    except (FileNotFoundError, ValueError):  # empty where the machine lost power
        return {}


def write_status(folder: Path, state: str, step: int | None, reason: str = "") -> None:
    """Write status.json whole; a disk that is full costs the news, not the run."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"state": state, "step": step, "reason": reason, "time": now}
    temporary = folder / "status.json.partial"
    try:
        temporary.write_text(json.dumps(content) + "\n")
        temporary.rename(folder / "status.json")
    except OSError as error:
        say(f"\nlaclip: '{folder / 'status.json'}' could not be written: {error}")
