"""The one benchmark harness: interleaved timing, one JSON record a case, tables from records.

python benchmarks/harness.py FILE...    print the records of result files as a table

A result file holds one JSON object a line. Times on a GPU are CUDA events, on a CPU the wall clock
(where others share the machine, only ratios hold) or, where a benchmark says so, the process's.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Case:
    """One thing to time. `prepare(turn)` is not timed; what it returns goes to `run`.

    turn counts the calls, so that a case can rotate through inputs larger than the cache. work is
    in units a call: throughput is work / median / divisor.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[int], Any] = lambda turn: turn
    work: float = 1.0
    unit: str = "calls/s"
    divisor: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """What is kept of a case. Times are in milliseconds; a case that failed has none."""

    subject: str
    name: str
    shape: dict[str, int]
    dtype: str
    median: float | None
    p20: float | None
    p80: float | None
    repeats: int
    throughput: float | None
    unit: str
    peak_memory_mib: float | None
    failed: str | None
    extra: dict[str, Any]
    machine: str
    gpu: str | None
    driver: str | None
    versions: dict[str, str]
    commit: str
    date: str


@cache
def facts(device: str) -> dict[str, Any]:
    """Machine, GPU, driver, versions and commit, as every record carries them."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists() and (found := re.search(r"model name\s*: (.*)", cpu_info.read_text())):
        model = found[1].strip()
    gpu = driver = None
    if device == "cuda":
        gpu = torch.cuda.get_device_name()
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "open_clip_torch", "inf_cl", "siglip_kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    commit = commit or os.environ.get("COMMIT", "unknown")  # a copy without .git
    if _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"):
        commit += "+changes"
    return {
        "machine": f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} used",
        "gpu": gpu,
        "driver": driver,
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _timed(case: Case, turn: int, device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        # Where the cases' memory together exceeds the GPU's, the one before holds what this one
        # needs, and to get it back from the driver takes up to the time of a call: that call is
        # not counted. A third is, as a case may need nearly all of the memory by itself.
        for _ in range(3):
            state = case.prepare(turn)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            fetched = torch.cuda.memory_stats()["num_device_alloc"]
            start.record()
            case.run(state)
            end.record()
            end.synchronize()
            del state
            if torch.cuda.memory_stats()["num_device_alloc"] == fetched:
                break
        return start.elapsed_time(end)
    state = case.prepare(turn)
    begin = clock()
    case.run(state)
    return (clock() - begin) * 1e3


def _resident_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _peak_memory_mib(case: Case, device: str) -> float:
    """What one call holds at most beyond what is there before it (on a CPU: resident memory)."""
    if device == "cuda":
        state = case.prepare(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.run(state)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    state = case.prepare(0)
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident_mib("VmRSS")
    case.run(state)
    return max(0.0, _resident_mib("VmHWM") - before)


@contextmanager
def _noted(case: Case, failures: dict[str, str]) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        failures[case.name] = "out of memory"
    except Exception as problem:
        traceback.print_exc()
        failures[case.name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]


def compare(
    subject: str,
    cases: Iterable[Case],
    *,
    shape: dict[str, int],
    dtype: str,
    device: str,
    seconds: float = 2.0,
    most: int = 50,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Time the cases turn about, after a warm-up of each.

    Each gets about `seconds` in all: at least 5 calls (3 where one takes that long), at most
    `most`. A case that raises is recorded as failed, with its message, and the others go on.
    clock: of a CPU's times; time.process_time where others share its cores.
    """
    failures: dict[str, str] = {}
    peaks: dict[str, float] = {}
    estimates: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    cases = list(cases)
    for case in cases:
        with _noted(case, failures):
            _timed(case, 0, device, clock)
            once = _timed(case, 1, device, clock)
            estimates[case.name] = (
                once if once > seconds * 1e3 else min(once, _timed(case, 2, device, clock))
            )
            peaks[case.name] = _peak_memory_mib(case, device)
            times[case.name] = []
        if device == "cuda":
            torch.cuda.empty_cache()
    repeats = {
        name: max(
            5 if estimates[name] < seconds * 1e3 else 3,
            min(most, int(seconds * 1e3 / max(estimates[name], 1e-3))),
        )
        for name in times
    }
    for turn in range(max(repeats.values(), default=0)):
        for case in cases:
            if turn < repeats.get(case.name, 0) and case.name not in failures:
                with _noted(case, failures):
                    times[case.name].append(_timed(case, turn, device, clock))
    records = []
    for case in cases:
        taken = [] if case.name in failures else sorted(times[case.name])
        middle = statistics.median(taken) if taken else None
        records.append(
            Record(
                subject,
                case.name,
                shape,
                dtype,
                middle,
                taken[len(taken) // 5] if taken else None,
                taken[-1 - len(taken) // 5] if taken else None,
                len(taken),
                case.work / (middle / 1e3) / case.divisor if middle else None,
                case.unit,
                peaks.get(case.name),
                failures.get(case.name),
                case.extra,
                **facts(device),
            )
        )
    return records


def append(records: Iterable[Record], path: Path) -> None:
    """Add records to a result file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def load(paths: Iterable[Path]) -> list[Record]:
    """The records of result files, in order."""
    lines = (line for path in paths for line in path.read_text().splitlines() if line)
    return [Record(**json.loads(line)) for line in lines]


def table(records: list[Record]) -> str:
    """Records as Markdown: a table for each subject, machine, shape's keys and commit."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        place = record.gpu or record.machine
        key = (record.subject, place, record.commit, tuple(record.shape), tuple(record.extra))
        groups.setdefault(key, []).append(record)
    text = []
    for (subject, place, commit, shape, extra), members in groups.items():
        versions = ", ".join(f"{k} {v}" for k, v in members[0].versions.items())
        text.append(f"\n{subject} on {place}; commit {commit}; {versions}\n")
        heads = [*shape, "dtype", "case", "ms (p20-p80)", "throughput", "MiB", *extra]
        text += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
        for r in members:
            timing = f"{r.median:.4g} ({r.p20:.4g}-{r.p80:.4g})" if r.median else r.failed or "-"
            rate = f"{r.throughput:.4g} {r.unit}" if r.throughput else "-"
            memory = "-" if r.peak_memory_mib is None else f"{r.peak_memory_mib:.0f}"
            values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.extra.values()]
            sizes = [f"{size:,}" for size in r.shape.values()]
            cells = [*sizes, r.dtype, r.name, timing, rate, memory, *values]
            text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the records of result files as a table.")
    parser.add_argument("files", nargs="+", type=Path, help="result files (.jsonl)")
    options = parser.parse_args()
    try:
        print(table(load(options.files)))
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"harness: {error}")


if __name__ == "__main__":
    main()
