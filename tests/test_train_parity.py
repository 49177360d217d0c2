"""Runs of the job beside open_clip's training loop on the same batches."""

import json
import os
import subprocess
import sys

import pytest
import torch
from train_job import (
    ROOT,
    TINY,
    arguments,
    assert_its_last_checkpoint_holds_its_weights,
    losses,
    metrics,
    run,
)

from laclip.config import load_config
from laclip.model import build_model

SETTINGS = [
    *("data.captions=original", "train.steps=20", "model.vision.depth=2", "model.text.depth=2"),
    *("optimizer.lr=1e-3", "optimizer.end_lr=0", "optimizer.eps=1e-6", "optimizer.clip_norm=1.5"),
]


@pytest.mark.parametrize("loss, stage, micro", [("clip", 2, 8), ("siglip", 1, 8), ("siglip", 1, 0)])
def test_updates_on_two_ranks_are_those_of_open_clip_on_one(tmp_path, loss, stage, micro):
    settings = [*SETTINGS, f"train.loss={loss}", f"train.micro_batch_size={micro}"]
    config = load_config(ROOT / "configs" / "demo.toml", [*TINY, *settings])
    torch.manual_seed(7)
    first = build_model(config.model, 49408, 49407, loss == "siglip").state_dict()
    if loss == "siglip":
        first["logit_bias"].fill_(-4.0)
    torch.save(first, tmp_path / "first.pt")
    weights = f"model.weights={tmp_path / 'first.pt'}"
    run(arguments(tmp_path / "run", *settings, weights, stage=stage), ranks=2)
    command = [sys.executable, "requirements/oracles.py", "tests/oracles/updates.py"]
    done = subprocess.run(
        [*command, tmp_path / "run", tmp_path / "first.pt"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout)
    norms = [record["gradient_norm"] for record in metrics(tmp_path / "run")]
    assert max(norms) > config.optimizer.clip_norm
    assert losses(tmp_path / "run") == pytest.approx(theirs["losses"], rel=1e-6)
    assert theirs["apart"] < 1e-4
    assert_its_last_checkpoint_holds_its_weights(tmp_path / "run")
