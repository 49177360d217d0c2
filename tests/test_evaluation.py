"""Scores of held-out data, by hand."""

import sys

import pytest
import torch
from train_job import environment, run_ranks

from laclip.config import DataConfig, TaskConfig
from laclip.evaluation.held_out import evaluate, image_to_text, named, text_to_image
from laclip.parallel import JointError, Ranks

SIMILARITY = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.3, 0.1], [0.5, 0.8, 0.7], [0.1, 0.2, 0.6]])
TEXT_OF = torch.tensor([0, 1, 2, 2])


def test_images_find_their_text_and_ties_count_against_them():
    scores = image_to_text(SIMILARITY, TEXT_OF)
    assert scores == {"top1": 0.5, "top5": 1.0, "chance": 1 / 3, "n": 4}


def test_texts_find_the_nearest_of_their_images():
    scores = text_to_image(SIMILARITY, TEXT_OF)
    assert scores["recall_at_1"] == pytest.approx(2 / 3)
    assert scores["chance"] == pytest.approx((1 + 1 + 2) / 3 / 4) and scores["n"] == 3


def test_a_model_whose_features_are_not_finite_finds_nothing():
    nothing = torch.full((8, 8), torch.nan)
    scores = image_to_text(nothing, torch.arange(8))
    assert scores["top1"] == scores["top5"] == 0
    scores = text_to_image(nothing, torch.arange(8))
    assert scores["recall_at_1"] == scores["recall_at_5"] == 0


def test_a_task_of_which_no_image_decodes_is_named(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(b"no image")
    sizes = {"image_size": 16, "context_length": 77, "batch_size": 2}
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    message = "evaluation.tasks.pets: .*none of its 2 images decodes; "
    with pytest.raises(JointError, match=message), named("pets"):
        task = TaskConfig(str(tmp_path), "zero_shot")
        evaluate(task, lambda x: x.flatten(1), None, None, DataConfig(), ranks=ranks, **sizes)


ALIKE = """
import os
import torch.distributed as dist
from laclip.config import TaskConfig
from laclip.evaluation.held_out import check_alike
dist.init_process_group("gloo")
check_alike(TaskConfig("here"), ["same"])
check_alike(TaskConfig("there"), [os.environ["RANK"]])
"""


def test_ranks_that_find_other_images_score_nothing():
    codes, outputs = run_ranks([sys.executable, "-c", ALIKE], environment(), 2)
    message = "JointError: 'there' does not hold the same on all machines: rank 1 finds other"
    assert all(codes) and all(message in output for output in outputs)
