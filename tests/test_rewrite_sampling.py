"""Sampling of the engine transformers: the distribution asked for, by counter-based numbers."""

import pytest
import torch

from laclip.rewrite.engine import Sampling
from laclip.rewrite.local_model import _Sample
from laclip.rewrite.prompts import load_prompts

PROBABILITIES = torch.tensor([0.02, 0.5, 0.08, 0.3, 0.04, 0.06])


def sample(seeds, scores, step=0, **settings):
    sampling = Sampling(load_prompts("plain"), **settings)
    ids = torch.zeros(len(seeds), 10 + step, dtype=torch.long)
    return _Sample(seeds, 10, sampling)(ids, scores).argmax(dim=-1)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.9), (2.0, 0.7)])
def test_tokens_come_as_often_as_temperature_and_top_p_say(temperature, top_p):
    count = 20_000
    scores = PROBABILITIES.log().repeat(count, 1)
    found = sample(range(count), scores, temperature=temperature, top_p=top_p)
    expected = PROBABILITIES ** (1 / temperature)
    expected = expected / expected.sum()
    kept, reached = torch.zeros(6, dtype=torch.bool), 0.0
    for token in expected.argsort(descending=True).tolist():
        if reached < top_p:
            kept[token] = True
        reached += float(expected[token])
    expected = torch.where(kept, expected, 0) / expected[kept].sum()
    share = torch.bincount(found, minlength=6) / count
    assert torch.equal(share > 0, kept)
    assert (share - expected).abs().max() < 5 * (0.25 / count) ** 0.5  # five standard errors


def test_a_row_depends_on_its_seed_and_step_and_not_on_its_batch():
    scores = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    seeds = list(range(100, 150))
    together = sample(seeds, scores)
    alone = [sample([seed], scores[i : i + 1]).item() for i, seed in enumerate(seeds)]
    assert together.tolist() == alone
    assert sample(seeds, scores, step=1).tolist() != alone
    assert sample(seeds[::-1], scores).tolist() != alone


def test_temperature_zero_takes_the_most_likely_token():
    scores = PROBABILITIES.log().repeat(20, 1)
    assert sample(range(20), scores, temperature=0.0).tolist() == [1] * 20
