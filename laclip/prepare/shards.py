"""Running one function over many shards: on local processes or on a Ray cluster, with progress."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import Any

from laclip.ray_tasks import run_on_ray


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that works shard by shard."""
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes on this machine (default: one a core)",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="run the shards on a Ray cluster (RAY_ADDRESS, or a local one); the folder must be "
        "on a file system that every node sees",
    )


def run_shards(
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    *,
    total: int,
    label: str,
    unit: str = "shards",
    jobs: int = 1,
    ray: bool = False,
    weigh: Callable[[Any], tuple[float, str]] = lambda result: (1.0, "shards"),
) -> Iterator[tuple[int, Any]]:
    """(i, function(*task i)) of every task, in parallel, as they end, with a line of progress.

    `function` is a module-level function; there are `total` tasks; `weigh(result)` gives what the
    progress line adds up and its unit, 0 for a task that an earlier run had done. The first
    exception stops the run: shards already done stay done.
    """
    progress = _Progress(label, total, unit)
    if ray:
        finished = run_on_ray(function, tasks)
    elif jobs > 1 and total > 1:
        finished = _on_processes(function, tasks, min(jobs, total))
    else:
        finished = ((i, function(*task)) for i, task in enumerate(tasks))
    for index, result in finished:
        progress.add(*weigh(result))
        yield index, result
    progress.close()


def in_order(finished: Iterable[tuple[int, Any]]) -> list[Any]:
    """The results of `run_shards` by the tasks' order."""
    return [result for _, result in sorted(finished, key=lambda item: item[0])]


def _on_processes(function, tasks, jobs: int) -> Iterator[tuple[int, Any]]:
    # spawn: a fork of a process with threads may hang.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
        waiting = iter(enumerate(tasks))
        running: dict[Any, int] = {}
        try:
            while True:
                while len(running) < 2 * jobs and (item := next(waiting, None)) is not None:
                    running[pool.submit(function, *item[1])] = item[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "one of its processes was killed, perhaps for want of memory. Run it again, with "
                "fewer --jobs; what is done stays done"
            ) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next shard for ever."""
    parent = parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch():
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Progress:
    """Tasks done, rate, time left: one line on a terminal's stderr, elsewhere a line a minute."""

    def __init__(self, label: str, total: int, tasks: str):
        self.label, self.total, self.tasks = label, total, tasks
        self.done, self.worked, self.amount = 0, 0, 0.0
        self.begin = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, amount: float, unit: str) -> None:
        self.done += 1
        self.worked += amount > 0
        self.amount += amount
        now = time.monotonic()
        due = now - self.shown >= (0.2 if self.terminal else 60)
        if not due and not (self.terminal and self.done == self.total):
            return
        self.shown = now
        elapsed = max(now - self.begin, 1e-9)
        # What was done before took no time and tells nothing of the rest.
        left = int(elapsed / (self.worked or self.done) * (self.total - self.done))
        rate = self.amount / elapsed
        line = (
            f"{self.label}: {self.done}/{self.total} {self.tasks}, "
            f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.2f}'} {unit}/s, "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        )
        sys.stderr.write(f"\r{line} \x1b[K" if self.terminal else f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.terminal and self.total:
            sys.stderr.write("\n")
