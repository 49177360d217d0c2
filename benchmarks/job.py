"""The whole job beside open_clip's trainer: the demo's data, model and schedule, end to end.

    python -m pip install --no-deps --target RIVALS webdataset==0.2.86 braceexpand==0.1.7
    PYTHONPATH=RIVALS python benchmarks/job.py [--epochs 30] [--out FILE]

Plain CLIP on the original captions (configs/demo_clip.toml): open_clip has no rewrites. Both are
timed from start to end, imports, checkpoints and laclip's own scores and report included, and
scored by laclip on the demo's held-out sets. Open_clip gets one process for its data. CPU seconds
are those of all processes, which others on the machine stretch less than the clock.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import harness
import torch
import torch.distributed as dist

from laclip.checkpoint import main_score
from laclip.config import Config, load_config
from laclip.convert import read_checkpoint, to_laclip
from laclip.dataset import open_dataset
from laclip.evaluation.held_out import evaluate
from laclip.model import build_model
from laclip.parallel import Ranks
from laclip.tokenizer import load_tokenizer

ROOT = harness.ROOT
CONFIG = ROOT / "configs" / "demo_clip.toml"
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def open_clip_arguments(
    config: Config, folder: Path, epochs: int, seed: int, samples: int
) -> list[str]:
    """open_clip_train's options for the same run, its model in a file of its own format."""
    vision, text = config.model.vision, config.model.text
    model = {
        "embed_dim": config.model.embed_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.depth,
            "width": vision.width,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
        },
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": 49408,
            "layers": text.depth,
            "width": text.width,
            "heads": text.heads,
        },
    }
    (folder / "demo.json").write_text(json.dumps(model))
    shards = [path for part in config.data.train for path in sorted(Path(part).glob("*.tar"))]
    batch, optimizer = config.train.global_batch_size, config.optimizer
    steps = -(-samples // batch)
    return [
        *("--model", "demo", "--dataset-type", "webdataset"),
        *("--train-data", "::".join(map(str, shards)), "--train-num-samples", str(samples)),
        *("--batch-size", str(batch), "--epochs", str(epochs), "--workers", "1"),
        *("--lr", str(optimizer.lr), "--wd", str(optimizer.weight_decay)),
        *("--beta1", str(optimizer.betas[0]), "--beta2", str(optimizer.betas[1])),
        *("--eps", str(optimizer.eps), "--warmup", str(round(optimizer.warmup_epochs * steps))),
        *("--precision", config.train.precision, "--save-frequency", "8"),
        *("--aug-cfg", "scale=({}, {})".format(*config.data.crop_scale)),
        *("--logs", str(folder), "--name", "run", "--seed", str(seed)),
    ]


def run_open_clip(folder: Path, arguments: list[str]) -> None:
    """In a process of its own, beside open_clip's packages."""
    import open_clip

    if importlib.util.find_spec("pandas") is None:  # which its CSV data sets alone use
        sys.modules["pandas"] = ModuleType("pandas")
    from open_clip_train.main import main as train

    open_clip.add_model_config(folder)
    train(arguments)


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Seconds by the clock and of all processors; the run's output goes to `log`."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file).returncode
    if code:
        sys.exit(f"job: {' '.join(command[:4])} ... failed ({code}):\n{log.read_text()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "CPU seconds": cpu}


def scores(weights: dict, config: Config) -> dict[str, float]:
    """The first score of each held-out task."""
    tokenizer = load_tokenizer()
    model = build_model(config.model, tokenizer.vocab_size, tokenizer.eot_token)
    model.load_state_dict(weights)
    model.to(DEVICE).eval()
    found = {}
    for name, task in config.evaluation.tasks.items():
        task_scores, _ = evaluate(
            task,
            model.encode_image,
            model.encode_text,
            tokenizer,
            config.data,
            image_size=config.model.vision.image_size,
            context_length=config.model.text.context_length,
            batch_size=config.evaluation.batch_size,
            ranks=Ranks(0, 1, 0, DEVICE),
        )
        found[name] = main_score(task_scores)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--open-clip"]:
        run_open_clip(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).absolute(),
        help="a result file that records are added to",
    )
    options = parser.parse_args()
    os.chdir(ROOT)  # the configuration's folders are relative to it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    config = load_config(CONFIG, [])
    samples = sum(open_dataset(path).num_samples for path in config.data.train)
    batch = config.train.global_batch_size
    records = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        theirs = open_clip_arguments(config, folder, options.epochs, options.seed, samples)
        oracles = [sys.executable, str(ROOT / "requirements" / "oracles.py"), __file__]
        ours = [str(Path(sys.executable).with_name("deepspeed")), "laclip/train.py"]
        ours += ["--deepspeed_config", "configs/deepspeed/zero1.json", "--config", str(CONFIG)]
        ours += ["--set", f"run.folder={folder / 'ours'}", f"run.seed={options.seed}"]
        ours += [f"train.epochs={options.epochs}", "optimizer.end_lr=0"]  # as open_clip's
        os.environ.setdefault("DS_ACCELERATOR", DEVICE.type)
        jobs = {
            "laclip": (ours, folder / "ours" / "model.pt"),
            "open_clip": (
                [*oracles, "--open-clip", str(folder), *theirs],
                folder / "run" / "checkpoints" / f"epoch_{options.epochs}.pt",
            ),
        }
        for name, (command, weights) in jobs.items():
            found = timed(command, folder / f"{name}.log")
            state = read_checkpoint(weights)
            found |= scores(to_laclip(state) if name == "open_clip" else state, config)
            rate, clock = options.epochs * samples / found["seconds"], found["seconds"] * 1e3
            shape = {"images": samples, "batch": batch, "epochs": options.epochs}
            shape["seed"] = options.seed
            records.append(
                harness.Record(
                    "whole job", name, shape, config.train.precision, clock, clock, clock, 1, rate,
                    "images/s", None, None, found, **harness.facts(DEVICE.type),
                )
            )  # fmt: skip
            print(harness.table(records[-1:]), flush=True)
    if options.out:
        harness.append(records, options.out)


if __name__ == "__main__":
    main()
