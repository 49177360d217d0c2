"""Kill -9 at random moments of a run on two ranks, resume every time, compare the weights.

python benchmarks/soak_run.py [--kills 20] [--steps 300] [--zero 1] [--seed 0] [--out FILE]

Each time one rank or both are killed, at a moment drawn from the start of the processes or from a
stretch of training. What is left of the job must end by itself. At the end the weights
must equal, bit for bit, those of a run that nobody disturbed.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
SETTINGS = [
    *("model.embed_dim=32", "model.vision.width=32", "model.vision.depth=1"),
    *("model.vision.heads=2", "model.text.width=32", "model.text.depth=1", "model.text.heads=2"),
    *("train.epochs=0", "train.global_batch_size=32", "optimizer.warmup_epochs=0"),
    *("checkpoint.every_steps=5", "log.tensorboard=false", "evaluation.tasks={}"),
]


def start(folder: Path, steps: int, stage: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "laclip/train.py"]
    words += ["--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
    for setting in (*SETTINGS, f"run.folder={folder}", f"train.steps={steps}"):
        words += ["--set", setting]
    log = (folder.parent / f"{folder.name}.log").open("a")
    return [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank in range(2)
    ]


def steps_done(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append the record to this JSONL file")
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        quiet, disturbed = Path(temporary) / "quiet", Path(temporary) / "disturbed"
        begin = time.monotonic()
        processes = start(quiet, args.steps, args.zero)
        while not steps_done(quiet):
            time.sleep(0.05)
        start_up = time.monotonic() - begin
        assert [process.wait() for process in processes] == [0, 0], quiet.with_suffix(
            ".log"
        ).read_text()
        kills, ending = [], []
        while len(kills) < args.kills:
            processes = start(disturbed, args.steps, args.zero)
            # A moment of the start, or of the stretch of training that is this kill's share.
            latest = time.monotonic() + start_up * (draw.random() if draw.random() < 0.25 else 100)
            enough = steps_done(disturbed) + draw.randrange(args.steps // args.kills)
            while time.monotonic() < latest and steps_done(disturbed) <= enough:
                assert any(process.poll() is None for process in processes), "the run ended early"
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.2))
            victims = draw.choice([[0], [1], [0, 1]])
            for rank in victims:
                processes[rank].kill()
            killed_at = time.monotonic()
            for process in processes:
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    # Not yet connected to each other: there a launcher ends the rest like this.
                    process.terminate()
                    process.wait(timeout=60)
            ending.append(time.monotonic() - killed_at)
            kills.append([victims, steps_done(disturbed)])
            print(f"kill {len(kills)}: rank(s) {victims} after {kills[-1][1]} steps, "
                  f"the rest ended {ending[-1]:.1f} s later", flush=True)  # fmt: skip
        processes = start(disturbed, args.steps, args.zero)
        assert [process.wait() for process in processes] == [0, 0], disturbed.with_suffix(
            ".log"
        ).read_text()
        weights = [torch.load(folder / "model.pt") for folder in (quiet, disturbed)]
        equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        metrics = [
            [
                json.loads(line)["loss"]
                for line in (folder / "metrics.jsonl").read_text().splitlines()
            ]
            for folder in (quiet, disturbed)
        ]
    record = {
        "zero": args.zero,
        "steps": args.steps,
        "kills": kills,
        "median_seconds_to_end": round(statistics.median(ending), 2),
        "longest_seconds_to_end": round(max(ending), 2),
        "weights_equal": equal,
        "losses_equal": metrics[0] == metrics[1],
    }
    print(json.dumps(record))
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return 0 if equal and record["losses_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
