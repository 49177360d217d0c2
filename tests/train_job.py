"""The main job for tests: a tiny model on the embedded data, started as users start it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TINY = [
    *(
        "model.embed_dim=32",
        "model.vision.width=32",
        "model.vision.depth=1",
        "model.vision.heads=2",
    ),
    *("model.text.width=32", "model.text.depth=1", "model.text.heads=2"),
    *("train.epochs=0", "train.steps=8", "train.global_batch_size=32", "checkpoint.every_steps=4"),
    *("optimizer.warmup_epochs=0", "log.tensorboard=false", "evaluation.tasks={}"),
]


def environment(gpus=4):
    """Variables of a job: on the CPU unless there are as many GPUs as any test has ranks."""
    import torch

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    if torch.cuda.device_count() < gpus:
        env["DS_ACCELERATOR"] = "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


def arguments(folder, *overrides, stage=1, extra=()):
    settings = [f"run.folder={folder}", *TINY, *overrides]
    json_file = f"configs/deepspeed/zero{stage}.json"
    return ["laclip/train.py", "--deepspeed_config", json_file, *extra, "--set", *settings]


def run(words, ranks=1, launcher=False, check=True):
    """Run the job; plain processes with the launcher's variables start 6 s sooner."""
    if launcher:
        command = [
            BIN / "deepspeed",
            "--num_gpus",
            str(ranks),
            "--master_port",
            free_port(),
            *words,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
        )
        code, output = done.returncode, done.stdout + done.stderr
    else:
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env=environment()
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in processes]
        code, output = max(p.returncode for p in processes), "\n".join(outputs)
    if check:
        assert code == 0, output
    return code, output


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in metrics(folder)]


def status(folder):
    return json.loads((folder / "status.json").read_text())


class Job:
    """A running job: plain processes as srun would start them, or DeepSpeed's launcher."""

    def __init__(self, words, ranks=2, launcher=False, output=None):
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
        self.output = output or self.folder.with_suffix(".output")
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
