"""The main job for tests: a tiny model on the embedded data, started as users start it."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
# Seconds that a test waits for what comes, on a machine that may stand still for 20 of them.
# Less than the ten minutes after which a job's own watchdog would end it.
PATIENCE = 500
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
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
        )
        code, output = done.returncode, done.stdout + done.stderr
    else:
        codes, outputs = run_ranks([sys.executable, *words], environment(), ranks)
        code, output = max(codes), "\n".join(outputs)
    if check:
        assert code == 0, output
    return code, output


def run_ranks(command, env, ranks):
    """Run a command once a rank, with torchrun's variables; each one's exit code and output."""
    port = free_port()
    with contextlib.ExitStack() as files:
        # Files, as a rank whose pipe is full would keep the others waiting.
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=env
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=log,
                stderr=log,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [process.wait(PATIENCE) for process in processes]
        finally:
            for process in processes:
                process.kill()
            outputs = [log.seek(0) or log.read() for log in logs]
    return codes, outputs


def free_port():
    """A port for a job that opens it seconds later: one that the kernel gives to nobody else."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in metrics(folder)]


def status(folder):
    return json.loads((folder / "status.json").read_text())


def assert_its_last_checkpoint_holds_its_weights(folder):
    from laclip.checkpoint import find_weights, read_weights

    last, final = (read_weights(find_weights(folder, which)) for which in ("newest", None))
    assert last.keys() == final.keys()
    assert all(last[name].equal(final[name]) for name in final)


# The job, whose first rank stops itself (SIGSTOP) once it has reported a number of steps.
PAUSED = """
import os, runpy, signal, sys
from laclip.metrics import MetricsWriter
steps, sys.argv = int(sys.argv[1]), sys.argv[2:]
write = MetricsWriter.write
def write_and_stop(writer, record):
    write(writer, record)
    if record["step"] + 1 == steps:
        os.kill(os.getpid(), signal.SIGSTOP)
MetricsWriter.write = write_and_stop
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Job:
    """A running job: plain processes as srun would start them, or DeepSpeed's launcher.

    pause: after so many steps the first rank stands still until go_on() is called: what a short
    job is to meet in its midst does not depend on who is faster. Not with the launcher.
    """

    def __init__(self, words, ranks=2, launcher=False, output=None, pause=0):
        env, self.pause, self.port = environment(), pause, free_port()
        if pause:
            words = ["-c", PAUSED, str(pause), *words]
        if launcher:
            commands = [[BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", self.port]]
            variables = [{}]
        else:
            commands = [[sys.executable]] * ranks
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port}
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

    def wait_until(self, true):
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline, self.output.read_text()
            assert self.processes[0].poll() is None, self.output.read_text()
            time.sleep(0.02)

    def wait_for_steps(self, count):
        path = self.folder / "metrics.jsonl"  # whose last line may be half there
        self.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= count)

    def wait_for_pause(self):
        self.wait_for_steps(self.pause)
        stat = Path(f"/proc/{self.processes[0].pid}/stat")
        self.wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self):
        self.processes[0].send_signal(signal.SIGCONT)

    def pids(self):
        """All processes of this job, launchers included."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if f"run.folder={self.folder}".encode() in words:
                    found.append(int(entry.name))
        return sorted(found)

    def wait_for_the_end(self):
        """The exit codes; fails if anything of the job is left."""
        deadline = time.monotonic() + PATIENCE
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
