"""What interrupts the main job: signals, dead and hanging ranks, a lost launcher, a full disk."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_job import BIN, ROOT, arguments, environment, free_port, losses, metrics, run, status

# Long enough not to end before it is disturbed.
LONG = ["train.steps=5000", "checkpoint.every_steps=100000"]


class Job:
    """A running job: plain processes as srun would start them, or DeepSpeed's launcher."""

    def __init__(self, words, ranks=2, launcher=False):
        env = environment()
        if launcher:
            commands = [[BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", free_port()]]
            variables = [{}]
        else:
            commands = [[sys.executable]] * ranks
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            env |= {"SLURM_NTASKS": str(ranks)}
            variables = [
                {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(ranks)
            ]
        self.folder = Path(next(word for word in words if "run.folder=" in word).partition("=")[2])
        self.output = self.folder.with_suffix(".output")
        with self.output.open("w") as log:
            self.processes = [
                subprocess.Popen(
                    [*command, *words], cwd=ROOT, env=env | more, stdout=log, stderr=log
                )
                for command, more in zip(commands, variables)
            ]

    def wait_for_steps(self, count):
        deadline = time.monotonic() + 120
        while not (self.folder / "metrics.jsonl").exists() or len(metrics(self.folder)) < count:
            assert time.monotonic() < deadline, self.output.read_text()
            assert self.processes[0].poll() is None, self.output.read_text()
            time.sleep(0.02)

    def pids(self):
        """All processes of this job, launchers included."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode().split("\0")
                if f"run.folder={self.folder}" in words:
                    found.append(int(entry.name))
        return sorted(found)

    def wait_for_the_end(self, seconds):
        """The exit codes; fails if anything of the job is left after `seconds`."""
        deadline = time.monotonic() + seconds
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        while self.pids():
            assert time.monotonic() < deadline, f"orphans: {self.pids()}"
            time.sleep(0.05)
        return codes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


def test_slurms_processes_train_and_a_signal_to_one_stops_all(tmp_path):
    with Job(arguments(tmp_path / "run", *LONG)) as job:
        job.wait_for_steps(3)
        for _ in range(3):  # more of them change nothing
            job.processes[1].send_signal(signal.SIGTERM)
        assert job.wait_for_the_end(30) == [0, 0]
        found = status(job.folder)
        assert (found["state"], found["reason"]) == ("resumable", "stopped by SIGTERM")
        assert f"--resume {job.folder}" in job.output.read_text()
        newest = max((job.folder / "checkpoints").glob("step_*"))
        assert int(newest.name.removeprefix("step_")) == found["step"] == len(metrics(job.folder))


def test_the_launchers_end_stops_all_ranks_with_a_checkpoint(tmp_path):
    """SIGTERM to `deepspeed` alone leaves its children without a parent."""
    with Job(arguments(tmp_path / "run", *LONG), launcher=True) as job:
        job.wait_for_steps(3)
        job.processes[0].send_signal(signal.SIGTERM)
        job.wait_for_the_end(30)
        found = status(job.folder)
        assert found["state"] == "resumable" and found["step"] > 0
        assert found["reason"].startswith("stopped")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_at_once_with_its_name(tmp_path, victim):
    with Job(arguments(tmp_path / "run", *LONG)) as job:
        job.wait_for_steps(2)
        job.processes[victim].kill()
        codes = job.wait_for_the_end(10)
        assert sorted(codes) == [-signal.SIGKILL, 1]
        assert re.search(
            f"laclip: rank {victim} died, last known to be .*; the job ends", job.output.read_text()
        )
        found = status(job.folder)
        assert found["state"] == "resumable" and f"rank {victim} died" in found["reason"]


def test_a_hanging_rank_ends_the_job_after_the_timeout_with_its_name(tmp_path):
    with Job(arguments(tmp_path / "run", *LONG, "run.timeout_minutes=0.15")) as job:
        job.wait_for_steps(2)
        job.processes[1].send_signal(signal.SIGSTOP)
        job.processes[0].wait(timeout=30)
        assert "laclip: rank 1 was silent for 9 s" in job.output.read_text()
        assert "rank 1 was silent" in status(job.folder)["reason"]


def test_a_rank_that_raises_ends_the_job_with_its_reason(emoji_copy, tmp_path):
    """Images go bad under the run; which rank meets too many of them first is open."""
    from laclip.dataset import open_dataset

    dataset = open_dataset(emoji_copy)
    folder = tmp_path / "run"
    words = arguments(folder, *LONG, f"data.train=['{emoji_copy}']", "data.max_bad_fraction=0")
    with Job(words) as job:
        job.wait_for_steps(2)
        for number, shard in enumerate(dataset.shards):
            with (emoji_copy / shard.name).open("r+b") as file:
                for record in dataset.samples(number).records:
                    file.seek(int(record["offset"]))
                    file.write(bytes(64))
        codes = job.wait_for_the_end(30)
        assert all(code in (1, 2) for code in codes)
        output = job.output.read_text()
        assert "data.max_bad_fraction" in output and "Traceback" not in output
        assert "data.max_bad_fraction" in status(folder)["reason"]


def test_a_full_disk_costs_the_checkpoint_not_the_run(tmp_path):
    """A small file system of its own, filled after the first checkpoint and emptied again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        folder = disk / "run"
        words = arguments(folder, "train.steps=100000", "checkpoint.every_steps=10", stage=2)
        with Job(words) as job:
            job.wait_for_steps(12)
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(bytes(1 << 16))
            deadline = time.monotonic() + 60
            while job.output.read_text().count("The run goes on") < 2:
                assert time.monotonic() < deadline, job.output.read_text()
                time.sleep(0.05)
            left = [path.name for path in (folder / "checkpoints").glob("step_*")]
            assert left and not any(name.endswith(".partial") for name in left)
            assert "No space left on device" in job.output.read_text()
            filler.unlink()
            known = set(left)
            while not {path.name for path in (folder / "checkpoints").glob("step_*0")} - known:
                assert time.monotonic() < deadline, job.output.read_text()
                time.sleep(0.05)
            job.processes[0].send_signal(signal.SIGTERM)
            assert job.wait_for_the_end(30) == [0, 0]
        steps = [record["step"] for record in metrics(folder)]
        assert steps == sorted(set(steps))  # lost records leave no half lines
        assert status(folder)["step"] == steps[-1] + 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_checkpoints_of_another_zero_stage_are_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    run(arguments(folder, "train.steps=2"))
    (folder / "status.json").write_text('{"state": "running"}')
    code, output = run(arguments(folder, "train.steps=2", stage=2), check=False)
    assert code == 2 and "Traceback" not in output
    assert "was written under ZeRO stage 1, this job runs under stage 2" in output


def test_the_best_checkpoint_is_kept_and_two_ranks_resume_as_one(tmp_path):
    """Scored in training under ZeRO-3, stopped, gone on with on one rank by the same command."""
    folder = tmp_path / "run"
    tasks = 'evaluation.tasks={v={data="examples/emoji/unseen_vendor"}}'
    settings = [tasks, "evaluation.every_steps=3", "train.steps=12", "checkpoint.every_steps=100"]
    words = arguments(folder, *settings, "checkpoint.keep=1", stage=3)
    with Job(words) as job:
        job.wait_for_steps(8)
        job.processes[0].send_signal(signal.SIGTERM)
        job.wait_for_the_end(60)
    stopped = status(folder)["step"]
    assert 8 <= stopped < 12
    states = {
        path.name: json.loads((path / "state.json").read_text())
        for path in (folder / "checkpoints").glob("step_*")
    }
    scored = {
        record["step"] + 1: record["scores"]["v"]
        for record in metrics(folder)
        if "scores" in record
    }
    assert list(scored) == [step for step in (3, 6, 9) if step <= stopped]
    best = max(scored, key=scored.get)
    assert {state["step"] for state in states.values()} == {best, stopped}
    assert states[f"step_{best:08d}"]["score"] == scored[best]
    words = ["laclip/train.py", "--deepspeed_config", "configs/deepspeed/zero3.json"]
    run([*words, "--resume", str(folder)])
    run(arguments(tmp_path / "straight", *settings[2:]))
    assert losses(folder) == pytest.approx(losses(tmp_path / "straight"), abs=1e-4)
    assert "v" in json.loads((folder / "scores.json").read_text())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = run(arguments(tmp_path / "file" / "run"), ranks=2, check=False)
    assert code == 2 and "Traceback" not in output
    assert output.count(f"run.folder: '{tmp_path / 'file' / 'run'}' cannot be used") == 1


def test_the_lock_of_a_killed_build_is_named(tmp_path, monkeypatch):
    lock = tmp_path / "deepspeed_shm_comm_op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, output = run(arguments(tmp_path / "run"), check=False)
    assert code == 2 and f"rm '{lock}'" in output and "Traceback" not in output


def test_steps_that_are_not_finite_are_logged_and_end_the_run(tmp_path):
    folder = tmp_path / "run"
    # The first update throws the weights out of fp32's range.
    settings = ["optimizer.lr=1e30", "train.max_skipped_steps=3"]
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


HANGING = """
import sys, time, torch.distributed as dist
from laclip.parallel import find_ranks
from laclip.watchdog import Watchdog
import os
ranks = find_ranks()
dist.init_process_group("gloo")
def give_up(reason, report):
    if report:
        print(reason, flush=True)
    os._exit(3)
with Watchdog(ranks, 3.0, give_up, lambda: None) as watchdog:
    for batch in range(4):
        watchdog.doing(f"loading batch {batch}")
        if (ranks.rank, batch) == (1, 2):
            time.sleep(60)
        watchdog.doing(f"in step {batch}")
        dist.barrier()
"""


def test_the_rank_that_others_wait_for_is_named(tmp_path):
    (tmp_path / "hanging.py").write_text(HANGING)
    code, output = run([str(tmp_path / "hanging.py")], ranks=2, check=False)
    assert code == 3
    assert re.search(r"^rank 1 has been loading batch 2 for 3 s$", output, re.MULTILINE)
