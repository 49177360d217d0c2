"""MFU's formula against torch's own count of a step's FLOPs."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from laclip.captions import pack
from laclip.config import ModelConfig, TextConfig, VisionConfig
from laclip.flops import peak_flops, training_flops, utilization
from laclip.model import build_model

BATCH, CONTEXT, VOCABULARY, EOT = 6, 24, 100, 99


def configure(image_depth, text_depth, **options):
    vision = VisionConfig(image_size=64, patch_size=16, width=96, depth=image_depth, heads=3)
    vision = dataclasses.replace(vision, patch_dropout=options.pop("patch_dropout", 0.0))
    text = TextConfig(context_length=CONTEXT, width=64, depth=text_depth, heads=2, mlp_ratio=3.0)
    return ModelConfig(embed_dim=48, vision=vision, text=text, **options)


def counted(config, token_ids):
    """FLOPs of a step as torch counts them."""
    model = build_model(config, VOCABULARY, EOT)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        images, texts, scale = model(torch.zeros(BATCH, 3, 64, 64), token_ids, torch.arange(BATCH))
        (images.sum() + texts.sum() + scale).backward()
    return counter.get_total_flops()


def captions(length, *shape):
    token_ids = torch.ones(*shape, CONTEXT, dtype=torch.int32)
    token_ids[..., length - 1] = EOT
    return token_ids


@pytest.mark.parametrize("length", [CONTEXT, 8])
@pytest.mark.parametrize("variants", [1, 3])
@pytest.mark.parametrize("options", [{}, {"patch_dropout": 0.5}, {"lock_image": True}])
def test_a_layer_costs_what_torch_counts(options, variants, length):
    # Between two depths: the last block computes fewer rows than the formula counts.
    token_ids = captions(length, variants, BATCH)
    for deeper in ((4, 2), (2, 4)):
        small, large = configure(2, 2, **options), configure(*deeper, **options)
        found = counted(large, token_ids) - counted(small, token_ids)
        expected = training_flops(large, length, variants) - training_flops(small, length, variants)
        assert found == BATCH * expected


def test_the_whole_is_what_torch_counts_but_for_the_last_blocks_rows():
    config = configure(2, 2)
    token_ids = captions(CONTEXT, BATCH)
    saved = 0
    for tower, rows in ((config.vision, 17), (config.text, CONTEXT)):
        # Attention's output and the MLP: only the pooled row of each sequence.
        saved += 3 * (2 + 4 * tower.mlp_ratio) * (rows - 1) * tower.width**2
    # Nothing needs the gradient of the images.
    patches = 2 * 16 * 3 * 16**2 * config.vision.width
    assert counted(config, token_ids) == BATCH * (training_flops(config) - saved - patches)


def test_a_gpus_peak_is_found_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L40") == 181e12
    for other in ("RTX A4000", "RTX A1000 Laptop GPU", "H20", "A100-SXM4-40GB MIG 3g.20gb"):
        assert peak_flops(f"NVIDIA {other}") is None
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("Some Other GPU") is None


def test_utilization_counts_padded_and_real_tokens_and_no_share_of_an_unknown_peak():
    config = configure(2, 2)
    token_ids = torch.stack([captions(8, BATCH), captions(16, BATCH)])
    found = utilization(config, pack(token_ids, EOT), 1000.0, torch.device("cpu"))
    assert found == {
        "tflops_padded": pytest.approx(1e-9 * training_flops(config, None, 2)),
        "tflops_real": pytest.approx(1e-9 * training_flops(config, 12, 2)),
    }
    found = utilization(config, pack(token_ids[0], None), 1000.0, torch.device("cpu"))
    assert found["tflops_real"] == found["tflops_padded"]
    assert found["tflops_real"] == pytest.approx(1e-9 * training_flops(config))
