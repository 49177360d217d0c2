"""The model's options through the training job: weights, locks, layer decay, compilation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_job import environment

from laclip.cli import main
from laclip.config import load_config
from laclip.convert import from_laclip
from laclip.model import build_model

ROOT = Path(__file__).parent.parent
VOCABULARY, EOT = 49408, 49407
# LaCLIP's own architecture, whose weights three formats can hold.
SETTINGS = {
    "data.train": ["examples/emoji/train"],
    "model.embed_dim": 32,
    "model.vision.image_size": 64,
    "model.vision.width": 32,
    "model.vision.depth": 2,
    "model.vision.heads": 2,
    "model.vision.qk_norm": True,
    "model.vision.pre_norm": False,
    "model.vision.patch_bias": True,
    "model.text.width": 32,
    "model.text.depth": 2,
    "model.text.heads": 2,
    "train.global_batch_size": 32,
    "train.steps": 3,
    "optimizer.start_lr": 1e-3,
    "optimizer.weight_decay": 0.0,
    "log.tensorboard": False,
}
# Runs jobs one after the other, as deepspeed would start each; a mistake is what main() prints.
DRIVER = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from laclip.parallel import find_ranks
from laclip.train import parse_arguments, read_config, train
ranks, errors = find_ranks(), {}
for name, words in json.loads(sys.argv[1]).items():
    arguments = parse_arguments(words)
    try:
        resume = bool(arguments.resume)
        train(read_config(arguments), Path(arguments.deepspeed_config), ranks, resume)
    except (ValueError, FileNotFoundError) as error:
        errors[name] = str(error)
Path(sys.argv[2]).write_text(json.dumps(errors))
if dist.is_initialized():
    dist.destroy_process_group()
"""


def build(seed=1, **changes):
    sets = [f"{key}={json.dumps(value)}" for key, value in (SETTINGS | changes).items()]
    torch.manual_seed(seed)
    return build_model(load_config(None, sets).model, VOCABULARY, EOT)


def save_weights(folder):
    """One model in this project's, open_clip's and the release's layout, and ill-fitting ones."""
    model = build()
    state = model.state_dict()
    torch.save(state, folder / "own.pt")
    for kind in ("open_clip", "laclip_release"):
        torch.save(from_laclip(state, kind), folder / f"{kind}_original.pt")
        files = [str(folder / f"{kind}_original.pt"), str(folder / f"{kind}.pt")]
        assert main(["import", *files]) == 0
    assert main(["import", files[0], str(folder / "image.pt"), "--tower", "image"]) == 0
    trunk = {n: t for n, t in torch.load(folder / "image.pt").items() if "projection" not in n}
    torch.save(trunk, folder / "trunk.pt")
    torch.save(build(**{"model.vision.depth": 3}).state_dict(), folder / "deeper.pt")
    lacking = {n: t for n, t in state.items() if n != "text.projection.weight"}
    torch.save(lacking | {"text.head.weight": torch.zeros(2)}, folder / "renamed.pt")
    small = dict(state, **{"text.token_embedding.weight": torch.zeros(1000, 32)})
    torch.save(small, folder / "vocabulary.pt")


JOBS = {  # name: (ZeRO stage, settings); weights name files that save_weights writes
    "fresh": (1, {}),
    "own": (1, {"model.weights": "own"}),
    "open_clip": (1, {"model.weights": "open_clip"}),
    "laclip_release": (1, {"model.weights": "laclip_release"}),
    "lock_image": (1, {"model.weights": "own", "model.lock_image": True}),
    "lock_text": (2, {"model.weights": "own", "model.lock_text": True}),
    "lock_image_3": (  # LiT: an image tower, beside another text tower
        3,
        {"model.weights": "image", "model.lock_image": True, "model.text.width": 64},
    ),
    "lock_trunk": (2, {"model.weights": "trunk", "model.lock_image": True}),
    "layer_decay": (
        1,
        {"model.weights": "own", "optimizer.layer_decay": 0.5, "train.steps": 1},
    ),
    "dropout": (1, {"model.vision.patch_dropout": 0.5}),
    "dropout_in_parts": (1, {"model.vision.patch_dropout": 0.5, "train.micro_batch_size": 8}),
    "compiled": (3, {"train.compile": True}),
    "deeper": (1, {"model.weights": "deeper"}),
    "renamed": (1, {"model.weights": "renamed"}),
    "vocabulary": (1, {"model.weights": "vocabulary"}),
    "context": (1, {"model.weights": "own", "model.text.context_length": 99}),
    "unconverted": (1, {"model.weights": "open_clip_original"}),
    "patch": (1, {"model.vision.patch_size": 7}),
    "no_text": (1, {"model.weights": "image", "model.lock_text": True}),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All JOBS in one process; returns their folder and the messages of those that failed."""
    folder = tmp_path_factory.mktemp("jobs")
    save_weights(folder)
    words = {}
    for name, (stage, changes) in JOBS.items():
        settings = SETTINGS | {"run.folder": str(folder / name)} | changes
        if "model.weights" in settings:
            settings["model.weights"] = str(folder / f"{settings['model.weights']}.pt")
        words[name] = ["--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
        words[name] += ["--config", str(folder / "empty.toml")]
        for key, value in settings.items():
            words[name] += ["--set", f"{key}={json.dumps(value)}"]
    words["resumed"] = ["--deepspeed_config", "configs/deepspeed/zero2.json"]
    words["resumed"] += ["--resume", str(folder / "lock_trunk"), "--set", "model.weights=gone.pt"]
    (folder / "empty.toml").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(words), str(folder / "errors.json")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for name, more in (("image", ""), ("trunk", "image.projection, ")):
        fresh = f"laclip: '{folder}/{name}.pt' holds nothing of {more}logit_scale, text: fresh"
        assert done.stdout.count(fresh) == 1
    assert done.stdout.count("holds nothing") == 2 and done.stdout.count("going on at step 3") == 1
    return folder, json.loads((folder / "errors.json").read_text())


def losses(jobs, name):
    lines = (jobs[0] / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(jobs, name):
    path = jobs[0] / f"{name}.pt" if name == "own" else jobs[0] / name / "model.pt"
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("layout", ["open_clip", "laclip_release"])
def test_weights_of_other_projects_start_a_run_as_ones_own_do(layout, jobs):
    assert losses(jobs, layout) == losses(jobs, "own")
    assert losses(jobs, layout)[0] != losses(jobs, "fresh")[0]


@pytest.mark.parametrize(
    ("name", "locked"),
    [
        ("lock_image", "image."),
        ("lock_text", "text."),
        ("lock_image_3", "image."),
        ("lock_trunk", "image."),  # whose projection the weights leave to begin anew
    ],
)
def test_a_locked_tower_stays_as_it_was_bit_for_bit_and_the_rest_learns(name, locked, jobs):
    before, after = weights(jobs, "own"), weights(jobs, name)
    assert before.keys() == after.keys()
    for key in before:
        same = key.startswith(locked) and (name, key) != ("lock_trunk", "image.projection.weight")
        assert torch.equal(before[key], after[key]) == same, key


def test_a_fresh_projection_in_a_locked_tower_learns(jobs):
    after = weights(jobs, "lock_trunk")["image.projection.weight"]
    moved = (after - build(seed=0).image.projection.weight).abs().max().item()
    assert 1e-3 < moved < 4e-3  # three steps of at most 1e-3


def test_layer_decay_shrinks_each_layers_first_step(jobs):
    # AdamW's first step moves what has a gradient by the learning rate; the peak is 1e-3.
    before, after = weights(jobs, "own"), weights(jobs, "layer_decay")
    for layers, part in ((0, "projection"), (1, "blocks.1"), (2, "blocks.0"), (3, "positional")):
        for tower in ("image", "text"):
            moved = max(
                (after[key] - before[key]).abs().max().item()
                for key in before
                if key.startswith(f"{tower}.{part}")
            )
            assert moved == pytest.approx(1e-3 * 0.5**layers, rel=0.02), (tower, part)


def test_patch_dropout_draws_the_same_patches_in_the_second_pass_over_a_part(jobs):
    assert losses(jobs, "dropout_in_parts") == pytest.approx(losses(jobs, "dropout"), abs=1e-5)
    assert losses(jobs, "dropout")[0] != pytest.approx(losses(jobs, "fresh")[0], abs=1e-4)


def test_compiled_blocks_under_zero_3_train_as_eager_ones_do(jobs):
    assert losses(jobs, "compiled") == pytest.approx(losses(jobs, "fresh"), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("deeper", ["not in this model: image.blocks.2.attention_out.bias", "and 11 more"]),
        ("renamed", ["missing: text.projection.weight", "not in this model: text.head.weight"]),
        ("vocabulary", ["text.token_embedding.weight [1000, 32], expected [49408, 32]"]),
        ("context", ["text.positional_embedding [77, 32], expected [99, 32]"]),
        ("unconverted", ["missing: image.", "go through: laclip import"]),
        ("patch", ["model.vision.image_size: 64 is no multiple of patch_size 7. Use 63"]),
        ("no_text", ["model.lock_text: '", "image.pt' holds nothing of the text tower, which"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_a_run_begins(name, messages, jobs):
    folder, errors = jobs
    for message in messages:
        assert message in errors[name]
    assert not (folder / name).exists()


def test_only_the_mistakes_failed(jobs):
    mistakes = {"deeper", "renamed", "vocabulary", "context", "unconverted", "patch", "no_text"}
    assert jobs[1].keys() == mistakes
