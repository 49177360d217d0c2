"""The paper's recipes in configs/: their values, their sizes, and two steps of each."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_job import environment

from laclip.config import load_config
from laclip.model import build_model
from laclip.typed_toml import flatten

ROOT = Path(__file__).parent.parent
RECIPES = sorted(
    path.stem for path in (ROOT / "configs").glob("*.toml") if not path.stem.startswith("demo")
)
PARAMETERS = {  # of the originals: tests/test_parity.py holds the presets to them
    "laclip_vit_b_16": 149_623_041,
    "vit_b_32": 151_277_313,
    "vit_b_16": 149_620_737,
    "vit_l_14": 427_616_513,
    "vit_h_14": 986_109_441,
}
# The paper's hyperparameters, by the data set that a recipe's name begins with.
OWN = {
    "data.crop_scale": (0.5, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3),
    "data.flip": False,
    "data.interpolation": "linear",
    "data.normalize": "imagenet",
    "model.preset": "laclip_vit_b_16",
    "train.global_batch_size": 8192,
    "train.loss": "clip",
    "train.label_smoothing": 0.0,
    "optimizer.lr": 1e-3,
    "optimizer.start_lr": 1e-6,
    "optimizer.end_lr": 1e-5,
    "optimizer.weight_decay": 0.5,
    "optimizer.betas": (0.9, 0.98),
    "optimizer.eps": 1e-8,
    "optimizer.warmup_epochs": 1.0,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 0.0,
    "optimizer.layer_decay": 1.0,
}
LAION = OWN | {
    "data.crop_scale": (0.9, 1.0),
    "data.interpolation": "cubic",
    "data.normalize": "openai",
    "train.global_batch_size": 32768,
    "train.epochs": 32.0,
    "optimizer.lr": 5e-4,
    "optimizer.end_lr": 0.0,
    "optimizer.weight_decay": 0.2,
    "optimizer.eps": 1e-6,
    "optimizer.warmup_epochs": 0.0,
    "optimizer.warmup_steps": 2000,
}
PAPER = {
    "cc3m": OWN | {"train.epochs": 40.0},
    "cc12m": OWN | {"train.epochs": 35.0},
    "redcaps": OWN | {"train.epochs": 30.0},
    "laion400m_b32": LAION | {"model.preset": "vit_b_32"},
    "laion400m_b16": LAION | {"model.preset": "vit_b_16"},
    "laion400m_l14": LAION
    | {"model.preset": "vit_l_14", "model.vision.activation": "quick_gelu"}
    | {"model.text.activation": "quick_gelu"},
    "laion400m_h14": LAION | {"model.preset": "vit_h_14"},
}
CAPTIONS = {"clip": "original", "laclip": "uniform", "laclip_mt": "multi"}
# Runs the words of several jobs, each in a process of its own with one start of Python for all:
# what every job imports on its way, for two seconds, is imported before.
DRIVER = """
import json, os, shutil, sys
from pathlib import Path
import deepspeed.runtime.zero.muon.original_muon
import matplotlib.backends.backend_svg, matplotlib.figure
import torch.utils.tensorboard
from laclip.train import main
for folder, words in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os._exit(main(words))
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {words}")
    shutil.rmtree(Path(folder) / "checkpoints")  # half a gigabyte and more
    (Path(folder) / "model.pt").unlink()
"""


def recipe(name):
    return load_config(ROOT / "configs" / f"{name}.toml")


def command(name):
    """The words after laclip/train.py in the command that the file names."""
    line = (ROOT / "configs" / f"{name}.toml").read_text().splitlines()[1]
    deepspeed, *words = shlex.split(line.removeprefix("# "))
    assert deepspeed == "deepspeed"
    return words[words.index("laclip/train.py") + 1 :]


def test_every_recipe_of_the_paper_is_there():
    small = [f"{data}_{kind}" for data in ("cc3m", "cc12m", "redcaps") for kind in CAPTIONS]
    large = [f"laion400m_{size}_{kind}" for size in ("b32", "b16", "l14") for kind in CAPTIONS]
    absent = {"cc3m_laclip_mt", "redcaps_laclip_mt"}
    absent |= {name for name in large if name.endswith("_mt")}
    assert set(RECIPES) == {*small, *large, "laion400m_h14_laclip"} - absent


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_papers_values_and_a_model_of_its_originals_size(name):
    config = recipe(name)
    values = flatten(config)
    data, *_ = name.partition("_clip" if name.endswith("_clip") else "_laclip")
    expected = PAPER[data] | {"data.captions": CAPTIONS[name.removeprefix(data + "_")]}
    expected |= {"run.folder": f"runs/{name}", "train.precision": "bf16"}
    assert {key: values[key] for key in expected} == expected
    with torch.device("meta"):
        model = build_model(config.model, 49408, 49407)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[config.model.preset]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_begins_with_its_command_hardware_time_and_score(name):
    title, _, *facts = (ROOT / "configs" / f"{name}.toml").read_text().splitlines()[:5]
    assert title.startswith(("# LaCLIP", "# CLIP"))
    for line, word in zip(facts, ("Hardware", "Time", "Score"), strict=True):
        assert line.startswith(f"# {word}: ")
    stage = 3 if "h14" in name else 1
    json_file = f"configs/deepspeed/zero{stage}.json"
    words = ["--deepspeed_config", json_file, "--config", f"configs/{name}.toml"]
    assert command(name) == words


def smaller(name, folder):
    """What makes a recipe run here: its data, two layers a tower, four pairs, two steps.

    All else is the recipe's: widths, heads, image size, patches, context, loss, precision,
    activation checkpointing, two micro-batches where it has any, the optimizer and its schedule.
    One of the recipes is compiled as they all are: the one under ZeRO-3, whose hooks compilation
    must step around. Each of the others would take 20 to 60 s more.
    """
    values = {
        "run.folder": str(folder / name),
        "data.train": ["examples/emoji/train"],
        "model.vision.depth": 2,
        "model.text.depth": 2,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2 if recipe(name).train.micro_batch_size else 0,
        "train.epochs": 0,
        "train.steps": 2,
        "log.every_steps": 1,
    }
    return values if "h14" in name else values | {"train.compile": False}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two steps of every recipe on the embedded data, under the ZeRO stage of its command."""
    folder = tmp_path_factory.mktemp("recipes")
    jobs = {
        str(folder / name): command(name)
        + [
            word
            for key, value in smaller(name, folder).items()
            for word in ("--set", f"{key}={json.dumps(value)}")
        ]
        for name in RECIPES
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(jobs)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_makes_two_steps_at_depth_2_under_its_zero_stage(name, runs):
    folder, output = runs
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0, 1]
    for record in records:  # 4 pairs that the model cannot tell apart yet
        assert record["loss"] == pytest.approx(math.log(4), abs=0.5)
        assert 0 < record["gradient_norm"] < 100
    begin = [line for line in output.splitlines() if line.startswith("laclip: ") and "ZeRO" in line]
    stage = json.loads((ROOT / command(name)[1]).read_text())["zero_optimization"]["stage"]
    assert f"ZeRO-{stage}, bf16" in begin[RECIPES.index(name)]
    ran, whole = (flatten(c) for c in (load_config(folder / name / "config.toml"), recipe(name)))
    changed = {key for key in whole if ran[key] != whole[key]}
    assert changed <= smaller(name, folder).keys()
