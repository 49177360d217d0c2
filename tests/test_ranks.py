"""Which device a process takes, on machines with GPUs that this one need not have; who is here."""

import datetime
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from train_job import free_port

from laclip.parallel import JointError, Ranks, find_ranks, meet

SLURM = {"SLURM_PROCID": "7", "SLURM_NTASKS": "8", "SLURM_LOCALID": "3", "MASTER_ADDR": "here"}
LAUNCHED = {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}


@pytest.mark.parametrize(
    ("variables", "gpus", "local_rank", "device"),
    [
        (SLURM, 4, 3, "cuda:3"),
        (SLURM, 1, 0, "cuda:0"),  # srun --gpus-per-task=1
        (SLURM, 0, 3, "cpu"),
        (LAUNCHED, 4, 3, "cuda:3"),
        (LAUNCHED | {"DS_ACCELERATOR": "cpu"}, 4, 3, "cpu"),
    ],
)
def test_a_rank_takes_its_own_gpu(monkeypatch, variables, gpus, local_rank, device):
    taken = pretend(monkeypatch, variables, gpus)
    ranks = find_ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (7, 8, local_rank)
    assert ranks.device == torch.device(device)
    assert taken == ([] if device == "cpu" else [torch.device(device)])
    assert os.environ["LOCAL_RANK"] == str(local_rank)  # DeepSpeed reads it


def test_a_rank_without_a_gpu_says_so(monkeypatch):
    pretend(monkeypatch, LAUNCHED, 2)
    with pytest.raises(SystemExit, match="rank 3 of this machine has no GPU, 2 can be seen"):
        find_ranks()


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 12),
        (LAUNCHED | {"LOCAL_SIZE": "4"}, 3),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "2"}, 6),  # torchrun on several machines
        (SLURM | {"SLURM_CPUS_PER_TASK": "12", "SLURM_NNODES": "2"}, 12),  # the task's own cores
        (SLURM | {"SLURM_CPUS_PER_TASK": "16", "SLURM_NNODES": "2"}, 12),  # srun was not told
        (SLURM | {"SLURM_NNODES": "2"}, 3),
        (SLURM | LAUNCHED | {"LOCAL_SIZE": "2", "SLURM_CPUS_PER_TASK": "12"}, 6),
    ],
)
def test_a_rank_takes_its_own_share_of_the_cores(monkeypatch, variables, threads):
    pretend(monkeypatch, variables, 4)
    del os.environ["OMP_NUM_THREADS"]
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    find_ranks()
    assert taken == [threads]


def test_tasks_of_srun_that_cannot_meet_say_so(monkeypatch):
    """Each would else be a job of its own, and train alone."""
    pretend(monkeypatch, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 4)
    with pytest.raises(SystemExit, match="need MASTER_ADDR"):
        find_ranks()


def pretend(monkeypatch, variables, gpus):
    """Returns the list of devices that were made the current one."""
    taken = []
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "1", **variables})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def meeting(monkeypatch, minutes, failures):
    """What each rank of a job that comes to its meeting hears, by rank; None: that all are here."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())

    stores = []

    def come(rank):
        ranks, timeout = (
            Ranks(rank, 4, rank, torch.device("cpu")),
            datetime.timedelta(minutes=minutes),
        )
        try:
            stores.append(meet(ranks, timeout, failures[rank]))
        except JointError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        return dict(zip(failures, threads.map(come, failures)))


@pytest.mark.parametrize("failed", [0, 2])
def test_all_ranks_hear_of_one_that_fails_before_they_are_connected(monkeypatch, failed):
    failures = {rank: "its disk is gone" if rank == failed else "" for rank in range(4)}
    heard = meeting(monkeypatch, 5, failures)
    assert heard == {rank: None if rank == failed else "its disk is gone" for rank in range(4)}


def test_ranks_that_all_come_meet(monkeypatch):
    assert meeting(monkeypatch, 5, dict.fromkeys(range(4), "")) == dict.fromkeys(range(4))


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr("laclip.parallel.FAREWELL", datetime.timedelta(seconds=1))
    heard = meeting(monkeypatch, 0.1, {0: "", 1: "", 3: ""})
    assert heard[0] == "rank 2 of 4 did not come in 0:00:06: see what they print"
    assert "rank 0" in meeting(monkeypatch, 0.01, {1: ""})[1]


def test_ranks_that_do_not_know_where_to_meet_say_so(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(JointError, match="MASTER_PORT is not set"):
        meet(Ranks(1, 2, 1, torch.device("cpu")), datetime.timedelta(seconds=1))
