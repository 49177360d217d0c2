"""What interrupts the main job: signals, dead and hanging ranks, a lost launcher, a full disk."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_job import (
    PATIENCE,
    ROOT,
    Job,
    arguments,
    environment,
    free_port,
    metrics,
    run,
    run_ranks,
    status,
)

from laclip.engine import remove_stale_lock

# Long enough not to end before it is disturbed.
LONG = ["train.steps=5000", "checkpoint.every_steps=100000"]


def test_the_launchers_end_stops_all_ranks_with_a_checkpoint(tmp_path):
    """SIGTERM to `deepspeed` alone leaves its children without a parent."""
    with Job(arguments(tmp_path / "run", *LONG), launcher=True) as job:
        job.wait_for_steps(3)
        job.processes[0].send_signal(signal.SIGTERM)
        job.wait_for_the_end()
        found = status(job.folder)
        assert found["state"] == "resumable" and found["step"] > 0
        assert found["reason"].startswith("stopped")
        assert not list(
            Path("/dev/shm").glob(f"*_{job.port}_*")
        )  # memory for ever, until it is full


def test_a_killed_rank_ends_the_job_at_once_with_its_name(tmp_path):
    with Job(arguments(tmp_path / "run", *LONG)) as job:
        job.wait_for_steps(2)
        job.processes[0].kill()
        codes = job.wait_for_the_end()
        assert sorted(codes) == [-signal.SIGKILL, 1]
        assert re.search(
            "laclip: rank 0 died, last known to be .*; the job ends", job.output.read_text()
        )
        found = status(job.folder)
        assert found["state"] == "resumable" and "rank 0 died" in found["reason"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder; fill(job), which makes writes in it fail, and empty(job); what the job then says.

    A file system of its own where one can be mounted; elsewhere a limit on the size of the job's
    files, which fails in the middle of a write as a full disk does.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    filler = disk / "filler"
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def limit(job, size):
        for process in job.processes:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def fill(job):
        if not mounted:
            return limit(job, 1 << 16)
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))

    def empty(job):
        if not mounted:
            return limit(job, resource.RLIM_INFINITY)
        filler.unlink()

    yield disk, fill, empty, "No space left on device" if mounted else "MiB are free there"
    if mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_costs_the_checkpoint_not_the_run(small_disk, tmp_path):
    """Filled after the first checkpoint and emptied again."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    disk, fill, empty, said = small_disk
    folder = disk / "run"
    settings = ["train.steps=100000", "checkpoint.every_steps=10", "log.tensorboard=true"]
    words = arguments(folder, *settings, stage=2)
    with Job(words, output=tmp_path / "output") as job:
        job.wait_for_steps(12)
        fill(job)
        job.wait_until(lambda: job.output.read_text().count("The run goes on") >= 2)

        def checkpoints():
            return {path.name for path in (folder / "checkpoints").glob("step_*")}

        def none_is_under_way():  # each failed one is gone before the next is tried
            return not any(name.endswith(".partial") for name in checkpoints())

        job.wait_until(none_is_under_way)
        known = {name for name in checkpoints() if not name.endswith(".partial")}
        assert known
        assert said in job.output.read_text()
        assert re.search(r"\([\d,]+ MiB are free there\)\. The run goes on", job.output.read_text())
        empty(job)
        job.wait_until(lambda: {name for name in checkpoints() if name.endswith("0")} - known)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.wait_for_the_end() == [0, 0]
    steps = [record["step"] for record in metrics(folder)]
    assert steps == sorted(set(steps))  # lost records leave no half lines
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[-1].step == steps[-1]
    assert status(folder)["step"] == steps[-1] + 1


def test_deepspeeds_scripts_that_find_no_room_cost_the_checkpoint_alone(tmp_path):
    folder = tmp_path / "run"
    with Job(arguments(folder, "train.steps=2", stage=2), pause=1) as job:
        job.wait_for_pause()
        (folder / "checkpoints" / "zero_to_fp32.py").mkdir(parents=True)  # where a file is to be
        job.go_on()
        assert job.wait_for_the_end() == [0, 0]
    output = job.output.read_text()
    assert output.count("The run goes on") == 1 and "zero_to_fp32.py" in output
    assert not list((folder / "checkpoints").glob("step_*"))
    assert status(folder)["state"] == "finished"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = run(arguments(tmp_path / "file" / "run"), check=False)
    assert code == 2 and "Traceback" not in output
    assert output.count(f"run.folder: '{tmp_path / 'file' / 'run'}' cannot be used") == 1


def test_only_the_lock_of_a_killed_build_is_removed(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    assert not remove_stale_lock(lock)
    (tmp_path / "operator.so").touch()
    for age in (0, 1000):
        with lock.open("w"):
            os.utime(lock, (time.time() - age,) * 2)
            assert not remove_stale_lock(lock) and lock.exists()
    for age in (9.5, 1000):  # the first waits: a process of another machine may hold it
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
        assert remove_stale_lock(lock) and not lock.exists()
    lock.touch()
    os.utime(lock, (time.time() + 1000,) * 2)  # the clock was set back
    monkeypatch.delattr(time, "sleep")
    assert remove_stale_lock(lock)


def test_steps_that_are_not_finite_are_logged_and_end_the_run(tmp_path):
    folder = tmp_path / "run"
    # The first update throws the weights out of fp32's range.
    settings = ["optimizer.lr=1e30", "train.max_skipped_steps=3", "optimizer.clip_norm=1.0"]
    code, output = run(arguments(folder, *settings, stage=0), ranks=2, check=False)
    assert code == 2 and "Traceback" not in output
    assert output.count("were not finite in 3 steps in a row, the last one step 3") == 1
    assert [record.get("skipped", False) for record in metrics(folder)] == [False] + 3 * [True]
    lines = (folder / "skipped_steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        samples = {tuple(sample) for sample in json.loads(line)["samples"]}
        assert len(samples) == 32
        assert all(path.endswith(".tar") and key for path, key in samples)
    assert status(folder)["state"] == "resumable"


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    folder = tmp_path / "run"
    settings = ["optimizer.lr=1e30", "optimizer.weight_decay=1e10", "checkpoint.every_steps=1"]
    code, output = run(arguments(folder, *settings, stage=3), ranks=2, check=False)
    assert code == 2 and "Traceback" not in output
    assert output.count("the weights are no longer finite after 1 steps and are not saved") == 1
    assert not list((folder / "checkpoints").glob("step_*")) and not (folder / "model.pt").exists()


def test_a_run_of_one_rank_that_fails_says_so_in_its_status(emoji_copy, tmp_path):
    next(emoji_copy.glob("*.captions")).unlink()
    code, output = run(arguments(tmp_path / "run", f"data.train={emoji_copy}"), check=False)
    assert code == 2 and ".captions' cannot be opened" in output
    found = status(tmp_path / "run")
    assert found["state"] == "resumable" and ".captions' cannot be opened" in found["reason"]


WATCHED = """
import os, signal, sys, time
import torch.distributed as dist
import laclip.watchdog
from laclip.parallel import find_ranks
from laclip.watchdog import Watchdog

SECONDS = 3.0
laclip.watchdog.PATIENCE = 2.0  # shorter, as with a job's ten minutes

def give_up(reason, report):
    if report:
        print(reason, flush=True)
    os._exit(3)

ranks = find_ranks()
dist.init_process_group("gloo")
with Watchdog(ranks, SECONDS, give_up, lambda: None) as watchdog:
    print("watched", flush=True)
    for batch in range(4):
        watchdog.doing(f"loading batch {batch}")
        if (ranks.rank, batch) == (1, 2):
            print(os.getpid(), file=sys.stderr, flush=True)
            FAULT
        watchdog.doing(f"in step {batch}")
        dist.barrier()
"""


SECONDS = r"(?:[3-9]|\d\d+)"


def test_a_rank_that_fails_before_the_ranks_are_connected_ends_the_job(tmp_path):
    program = "import os, runpy, sys; sys.argv = sys.argv[1:]\n"
    program += "if os.environ['RANK'] == '1': sys.modules['deepspeed'] = None\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, *arguments(tmp_path / "run")]
    codes, outputs = run_ranks(command, environment(), 2)
    assert codes == [2, 1] and "Traceback" not in outputs[0]
    assert "laclip: rank 1 failed: ModuleNotFoundError: import of deepspeed" in outputs[0]


@pytest.mark.parametrize(
    ("differs", "reason"),
    [
        ("sys.argv += ['optimizer.lr=5e-4'] * rank", "optimizer.lr is 0.0005, on rank 0 0.001"),
        ("os.chdir(sys.argv.pop(1 + rank))", "fingerprint.examples/emoji/train is '"),
    ],
)
def test_ranks_that_read_different_files_do_not_train(differs, reason, tmp_path):
    """As two machines do of which one has an older copy."""
    folders = [tmp_path / "0", tmp_path / "1"] if "chdir" in differs else []
    for folder, data in zip(folders, ("train", "unseen_vendor")):
        (folder / "examples" / "emoji").mkdir(parents=True)
        for name in ("laclip", "configs"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "examples" / "emoji" / "train").symlink_to(ROOT / "examples" / "emoji" / data)
    program = f"import os, runpy, sys; rank = int(os.environ['RANK']); {differs}\n"
    program += f"sys.argv = sys.argv[1 + {max(0, len(folders) - 1)}:]\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, *folders, *arguments(tmp_path / "run")]
    codes, outputs = run_ranks(command, environment(), 2)
    assert codes == [2, 2] and not (tmp_path / "run").exists()
    assert f"rank 1: ValueError: {reason}" in outputs[0]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("time.sleep(1000)", rf"rank 1 has been loading batch 2 for {SECONDS} s"),
        ("raise OSError('no such shard')", "rank 1 failed: OSError: no such shard"),
        (
            "os.kill(os.getpid(), signal.SIGSTOP)",
            rf"rank 1 was silent for {SECONDS} s, last known to be .*: stopped, or cut off from "
            "the network",
        ),
    ],
)
def test_the_rank_that_the_others_would_wait_for_is_named(fault, reason, tmp_path):
    script, output = tmp_path / "watched.py", tmp_path / "output"
    script.write_text(WATCHED.replace("FAULT", fault))
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    with output.open("w") as log:
        first, second = [
            subprocess.Popen(
                [sys.executable, script],
                env=environment() | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(2)
        ]
    try:
        assert first.wait(PATIENCE) == 3
        if "SIGSTOP" in fault:
            second.send_signal(signal.SIGCONT)  # what goes on finds the others gone
        assert second.wait(PATIENCE) in (1, 3)
    finally:
        first.kill(), second.kill()
    assert re.search(rf"^{reason}$", output.read_text(), re.MULTILINE)


def test_a_job_that_was_stopped_for_long_goes_on(tmp_path):
    """Ctrl-Z and fg: the time in which nothing ran is held against nobody."""
    script = tmp_path / "watched.py"
    lines = "iter(sys.stdin.readline, '')"
    text = WATCHED.replace("range(4)", lines).replace("FAULT", "pass")
    script.write_text(text.replace("SECONDS = 3.0", "SECONDS = 6.0"))
    process = subprocess.Popen(
        [sys.executable, script],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "watched\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(7)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.5)
        output, _ = process.communicate("1\n", timeout=PATIENCE)
    finally:
        process.kill()
    assert (process.returncode, output) == (0, "")
