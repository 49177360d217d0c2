"""The ranks of a job: who this process is, and how all of them agree."""

import datetime
import functools
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# How long a rank that fails before the ranks are connected tries to tell the others.
FAREWELL = datetime.timedelta(seconds=5)


class JointError(ValueError):
    """A mistake that every rank has found or been told of: one of them reports it."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def find_ranks() -> Ranks:
    """Read the launcher's variables; a process started without a launcher is a job of one."""
    if "RANK" not in os.environ:
        if "MASTER_ADDR" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise SystemExit(
                "laclip: srun started several tasks, which need MASTER_ADDR and MASTER_PORT to "
                "meet: docs/multi-node.md has a script that sets them"
            )
        if "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:  # srun, one task a rank
            os.environ["RANK"] = os.environ["SLURM_PROCID"]
            os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
            # srun --gpus-per-task shows a task its own GPU alone, as number 0.
            alone = torch.cuda.device_count() == 1
            os.environ["LOCAL_RANK"] = "0" if alone else os.environ["SLURM_LOCALID"]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(own_cores())
    # As DeepSpeed does, a machine with GPUs takes DS_ACCELERATOR=cpu for a wish.
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise SystemExit(
                f"laclip: rank {local_rank} of this machine has no GPU, {gpus} can be seen. Start "
                "one rank a GPU, or look at CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local_rank, device)


def own_cores() -> int:
    """How many cores this rank may keep busy; the ranks of a machine share what they may run on."""
    cores, names = len(os.sched_getaffinity(0)), os.environ
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):  # of DeepSpeed's launcher, of torchrun
        if name in names:
            return max(1, cores // int(names[name]))
    if "SLURM_CPUS_PER_TASK" in names and names["RANK"] == names.get("SLURM_PROCID"):
        return min(cores, int(names["SLURM_CPUS_PER_TASK"]))
    here = -(-int(names["WORLD_SIZE"]) // int(names.get("SLURM_NNODES", "1")))
    return max(1, cores // here)


def meet(ranks: Ranks, timeout: datetime.timedelta, failure: str = "") -> dist.TCPStore | None:
    """Wait until all ranks are here. Call it before they connect, and hold what it returns.

    failure: why this rank ends instead, for the others to hear. Raises JointError where one said
    so, or where one did not come in time: by itself the network's library names nobody.
    """
    if ranks.world_size == 1 or "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends them all
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise JointError(f"{name} is not set, where {ranks.world_size} ranks meet")
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(
            host, port, None, ranks.is_first, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistNetworkError as error:
        what = "cannot be opened" if ranks.is_first else "is not opened by rank 0, or out of reach"
        reason = str(error).partition("\n")[0]
        raise JointError(f"'{host}' port {port} {what}: {reason}") from None
    store.set(f"laclip/{ranks.rank}", "")
    if failure:
        store.set("laclip/news", failure)
    if store.add("laclip/came", 1) == ranks.world_size and not store.check(["laclip/news"]):
        store.set("laclip/news", "")
    try:
        news = store.get("laclip/news").decode()
        heard = store.add("laclip/heard", 1)
    except dist.DistNetworkError:
        news = "rank 0 ended before the ranks were connected"
    except dist.DistStoreError:
        lost = [r for r in range(ranks.world_size) if not store.check([f"laclip/{r}"])]
        who = f"{'rank' if len(lost) == 1 else 'ranks'} {', '.join(map(str, lost))}"
        news = f"{who} of {ranks.world_size} did not come in {timeout}: see what they print"
        store.set("laclip/news", news)
        heard = 0
    deadline = time.monotonic() + FAREWELL.total_seconds()
    while news and ranks.is_first and time.monotonic() < deadline and heard < ranks.world_size:
        time.sleep(0.05)
        heard = store.add("laclip/heard", 0)
    if news and not failure:
        raise JointError(news)
    return store


@functools.cache
def control_group() -> dist.ProcessGroup | None:
    """The group for objects: over the CPU, so that they never wait for the GPU's queue."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def set_timeouts(minutes: float) -> None:
    """Give all groups that there are this timeout.

    DeepSpeed makes groups of its own, and those of NCCL have 10 minutes, whatever was asked for.
    """
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(minutes=minutes), group)


def from_first(value: Any) -> Any:
    """The first rank's value, on all ranks; any object that pickles."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=control_group())
    return values


def start_sum(counts: Sequence[int]) -> Callable[[], list[int]]:
    """Start to sum whole numbers over the ranks, over the CPU, under whatever runs next.

    Call what is returned for the sums. Every rank gives as many numbers.
    """
    numbers = torch.tensor(counts, dtype=torch.int64)
    work = dist.all_reduce(numbers, group=control_group(), async_op=True)

    def finish() -> list[int]:
        work.wait()
        return numbers.tolist()

    return finish


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """All ranks' rows in the order of the ranks; their numbers may differ. `[n, ...]`."""
    counts = gather_objects(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts)])


def raise_on_all(error: BaseException | None, what: str) -> None:
    """Raise JointError on every rank if any rank failed."""
    failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise JointError(f"{what} failed on rank {rank}: {failure}") from error
