"""Parameter groups, the fused optimizer, and the schedule."""

import itertools
import math

import pytest
import torch

from laclip.config import ModelConfig, TextConfig, VisionConfig
from laclip.model import build_model
from laclip.optimizer import Schedule, build_optimizer, parameter_groups


def small_model(**options):
    vision = VisionConfig(image_size=32, patch_size=16, width=32, depth=3, heads=2)
    text = TextConfig(width=32, depth=2, heads=2)
    return build_model(ModelConfig(embed_dim=16, vision=vision, text=text, **options), 50, 49)


def by_name(groups, key):
    return {name: group[key] for group in groups for name in group["names"]}


def test_every_trainable_parameter_is_in_one_group_under_its_name():
    model = small_model(lock_image=True)
    groups = parameter_groups(model, 0.2, 0.9)
    listed = {n: p for g in groups for n, p in zip(g["names"], g["params"], strict=True)}
    expected = {n: p for n, p in model.named_parameters() if not n.startswith("image.")}
    assert listed.keys() == expected.keys()
    assert all(listed[name] is expected[name] for name in expected)
    assert sum(len(g["params"]) for g in groups) == len(expected)


def test_only_tensors_of_two_or_more_dimensions_decay():
    model = small_model()
    decay = by_name(parameter_groups(model, 0.2), "weight_decay")
    assert decay == {n: 0.2 if p.ndim >= 2 else 0.0 for n, p in model.named_parameters()}
    assert decay["logit_scale"] == 0.0
    assert decay["image.blocks.0.mlp_in.weight"] == 0.2


def test_layer_decay_lowers_the_rate_with_the_distance_from_the_output():
    scale = by_name(parameter_groups(small_model(), 0.2, 0.5), "lr_scale")
    assert scale["logit_scale"] == scale["image.projection.weight"] == scale["text.norm.bias"] == 1
    assert scale["image.blocks.2.norm1.weight"] == scale["text.blocks.1.mlp_out.weight"] == 0.5
    assert scale["image.blocks.0.qkv.weight"] == 0.125
    assert scale["image.patch_embedding.weight"] == scale["image.norm_pre.weight"] == 0.0625
    assert scale["text.token_embedding.weight"] == scale["text.positional_embedding"] == 0.125


def test_one_step_equals_adamw_by_hand_with_decay_and_rate_of_each_group():
    torch.manual_seed(0)
    model = small_model()
    optimizer = build_optimizer(
        model, learning_rate=0.1, eps=1e-6, weight_decay=0.3, layer_decay=0.5
    )
    assert all(group["fused"] for group in optimizer.param_groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    optimizer.step()
    rates = by_name(optimizer.param_groups, "lr")
    for name, parameter in model.named_parameters():
        decay = 0.3 if parameter.ndim >= 2 else 0.0
        # The first step's moments, bias-corrected, are the gradient and its square.
        direction = parameter.grad / (parameter.grad.abs() + 1e-6)
        expected = before[name] * (1 - rates[name] * decay) - rates[name] * direction
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


SCHEDULE = Schedule(peak=1e-3, start=1e-6, end=1e-5, warmup_steps=10, total_steps=110)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-6),
        (5, (1e-3 + 1e-6) / 2),
        (10, 1e-3),
        (60, (1e-3 + 1e-5) / 2),
        (110, 1e-5),
        (500, 1e-5),
    ],
)
def test_rate_warms_up_linearly_then_follows_a_cosine(step, expected):
    assert SCHEDULE.rate(step) == pytest.approx(expected, rel=1e-12)


def test_rate_rises_through_warm_up_and_falls_after_it():
    rates = [SCHEDULE.rate(step) for step in range(111)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    drops = [a - b for a, b in itertools.pairwise(rates[10:])]
    assert drops[50] == pytest.approx(math.pi / 200 * (1e-3 - 1e-5), rel=1e-3)


def test_rate_without_warm_up_starts_at_the_peak():
    assert SCHEDULE._replace(warmup_steps=0).rate(0) == 1e-3
