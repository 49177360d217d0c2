"""The main job for tests: a tiny model on the embedded data, started as users start it."""

import json
import os
import socket
import subprocess
import sys
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


def environment():
    import torch

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env


def arguments(folder, *overrides, stage=1, extra=()):
    settings = [f"run.folder={folder}", *TINY, *overrides]
    sets = [word for setting in settings for word in ("--set", setting)]
    json_file = f"configs/deepspeed/zero{stage}.json"
    return ["laclip/train.py", "--deepspeed_config", json_file, *extra, *sets]


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
