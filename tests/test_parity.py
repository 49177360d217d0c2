"""The presets against the real packages: open_clip, timm, transformers."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from laclip.config import PRESETS

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def oracle():
    """What tests/oracles/parity.py found, by kind and preset."""
    command = [sys.executable, "requirements/oracles.py", "tests/oracles/parity.py"]
    # One thread: as fast within a tenth, and several times faster on a busy machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = defaultdict(dict)
    for line in done.stdout.splitlines():
        for kind, values in json.loads(line).items():
            found[kind][values.get("preset")] = values
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_has_as_many_parameters_as_its_original(oracle, preset):
    assert oracle["count"][preset]["parameters"] == oracle["count"][preset]["expected"]


@pytest.mark.parametrize("preset", PRESETS)
def test_counted_flops_are_those_of_the_formula(oracle, preset):
    counted = oracle["count"][preset]["counted_flops"]
    assert oracle["count"][preset]["flops"] == counted


@pytest.mark.parametrize("preset", PRESETS)
def test_features_and_gradients_equal_the_originals_on_the_same_weights(oracle, preset):
    assert oracle["parity"][preset]["features"] <= 1e-5
    assert oracle["parity"][preset]["gradients"] <= 1e-4


@pytest.mark.parametrize("preset", ["vit_b_32", "laclip_vit_s_16"])
def test_fresh_weights_are_distributed_as_the_originals(oracle, preset):
    # In standard errors of a tensor's mean; the largest of about 60 tensors.
    assert oracle["initialization"][preset]["deviation"] <= 6, oracle["initialization"][preset]


def test_export_is_a_clip_model_that_transformers_loads_and_gives_back(oracle):
    found = oracle["hugging_face"][None]
    assert found["features"] <= 1e-5
    assert found["scale"] <= 1e-5
    assert found["back"] is True


@pytest.mark.parametrize(
    ("name", "normalize"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "inception"),
        ("vit_small_patch8_224.dino", "imagenet"),
        ("vit_huge_patch14_clip_quickgelu_224.dfn5b", "openai"),
    ],
)
def test_a_vit_of_timm_is_an_image_tower_without_its_projection(oracle, name, normalize):
    found = oracle["timm"][name]
    assert found["features"] <= 1e-5 and found["normalize"] == normalize
    assert found["fresh"] == ["image.projection", "logit_scale", "text"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", "has LayerScale, has register tokens"),
        ("vit_base_patch16_siglip_224.webli", "lacks a class token"),
        ("vit_small_patch16_dinov3.lvd1689m", "lacks biases of qkv, has LayerScale"),
        ("deit_tiny_distilled_patch16_224.fb_in1k", "has a distillation token"),
        ("flexivit_small.1200ep_in1k", "lacks positions of a class token"),
        ("vit_base_patch16_224_miil.in21k", "lacks biases of qkv"),
    ],
)
def test_a_vit_of_timm_with_more_than_the_image_tower_has_is_refused(oracle, name, reason):
    assert reason in oracle["timm"][name]["refused"]
