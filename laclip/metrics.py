"""What a run reports while it goes: metrics.jsonl, TensorBoard, Weights & Biases, the console."""

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import resource
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def say(text: str, end: str = "\n") -> None:
    """Print; where nobody reads any more (a closed pipe), go on without."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON, which has no NaN and no infinity: null stands for them."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def import_wandb() -> Any:
    """The package. Raises ValueError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "log.wandb_project is set, but the package wandb is not installed. "
            "Run: pip install 'laclip[wandb]'"
        ) from None
    return wandb


class MetricsWriter:
    """Appends one record a step to FOLDER/metrics.jsonl and mirrors it to the trackers.

    Opened for a run that goes on at `next_step`, it first drops the records of later steps, which
    the stopped run wrote but its checkpoint does not hold.
    """

    def __init__(self, folder: Path, *, next_step: int, tensorboard: bool, wandb_project: str):
        self.path = folder / "metrics.jsonl"
        _drop_records(self.path, next_step)
        self._file = self.path.open("ab", buffering=0)
        self._tensorboard: Any = None
        self._events = str(folder / "tensorboard") if tensorboard else ""
        self._wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self._events, purge_step=next_step)
        if wandb_project:
            identity = folder / "wandb_id"  # a run that goes on does so there, too
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self._wandb = import_wandb().init(
                project=wandb_project,
                name=folder.name,
                dir=str(folder),
                id=identity.read_text(),
                resume="allow",
            )

    def write(self, record: dict[str, Any]) -> None:
        """record: `step` and numbers, or flat dictionaries of numbers."""
        line = json_line(record).encode()
        begin = self._file.seek(0, os.SEEK_END)
        written = True
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            written = False
            self._file.truncate(begin)
            say(f"\nlaclip: the metrics of step {record['step']} are lost: {error}")
        numbers: dict[str, Any] = {}
        for name, value in record.items():
            if isinstance(value, dict):
                numbers |= {f"{name}/{key}": item for key, item in value.items()}
            elif name != "step":
                numbers[f"train/{name}"] = value
        if self._events and written:  # on a full disk its thread would end with a traceback
            self._to_tensorboard(numbers, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def _to_tensorboard(self, numbers: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._tensorboard = self._tensorboard or SummaryWriter(self._events)
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        except OSError as error:
            self._tensorboard = None  # its thread has ended: the next record begins a new file
            say(f"\nlaclip: TensorBoard's events up to step {step} are lost: {error}")

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # a full disk: metrics.jsonl has said so
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of FOLDER/metrics.jsonl; a last line that a killed run left half is dropped."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    with path.open(errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                if next(lines, None) is None:
                    return
                raise ValueError(f"'{path}' line {number} is not JSON: {line[:80]!r}") from None
            yield record


def _drop_records(path: Path, next_step: int) -> None:
    """Cut off the records from next_step on, and a last line that a killed run left half."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            with contextlib.suppress(ValueError):
                if json.loads(text[begin:end])["step"] < next_step:
                    break
            end = begin
        file.truncate(end)


def variant_names(datasets: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """One name a place in the datasets' lists of variants: "llm or blip" where they differ."""
    places = itertools.zip_longest(*datasets)
    return tuple(" or ".join(dict.fromkeys(name for name in place if name)) for place in places)


def variant_shares(names: tuple[str, ...], counts: np.ndarray) -> dict[str, float]:
    """Share of each caption variant among those drawn; counts: one a variant."""
    return {name: round(float(share), 4) for name, share in zip(names, counts / counts.sum())}


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Progress:
    """The line that a person watches: rewritten in place on a terminal, now and then elsewhere."""

    def __init__(self, total_steps: int, samples_per_epoch: int, batch_size: int):
        self.total_steps = total_steps
        self.samples_per_epoch = samples_per_epoch
        self.batch_size = batch_size
        self._terminal = sys.stdout.isatty()
        self._seconds_a_step: float | None = None
        self._last = 0.0
        self._width = 0

    def show(self, step: int, record: dict[str, Any]) -> None:
        """step: steps done. A line with scores of held-out data is always shown, and stays."""
        seconds = self.batch_size / record["images_per_second"]
        old = self._seconds_a_step
        self._seconds_a_step = seconds if old is None else 0.95 * old + 0.05 * seconds
        now, scores = time.monotonic(), record.get("scores", {})
        waits = now - self._last < (0.2 if self._terminal else 10)
        if step < self.total_steps and waits and not scores:
            return
        self._last = now
        left = (self.total_steps - step) * self._seconds_a_step
        share = f"MFU {100 * record['mfu_padded']:.1f} %  " if "mfu_padded" in record else ""
        line = (
            f"step {step}/{self.total_steps}  "
            f"epoch {step * self.batch_size / self.samples_per_epoch:.2f}  "
            f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{self.batch_size / self._seconds_a_step:,.0f} images/s  "
            f"{share}data wait {100 * record['data_wait']:.1f} %  left {duration(left)}"
        ) + "".join(f"  {name} {100 * score:.1f} %" for name, score in scores.items())
        if self._terminal:
            say("\r" + line.ljust(self._width), end="")
            self._width = len(line)
        else:
            say(line)
        if scores:
            self.end_line()

    def end_line(self) -> None:
        """Leave the line as it stands, so that other text may follow."""
        if self._terminal and self._width:
            say("")
            self._width = 0


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3:05 or 2:03:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
