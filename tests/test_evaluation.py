"""Scores of held-out data, by hand."""

import pytest
import torch

from laclip.evaluation import image_to_text, text_to_image

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
