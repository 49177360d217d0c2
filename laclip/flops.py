"""The arithmetic of a training step, and which share of the GPU's peak it is (MFU)."""

import math
import re
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from laclip.captions import PackedCaptions
    from laclip.config import ModelConfig

# Dense bf16 FLOP/s by words of the device's name, from the data sheets; the first match counts.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}


def training_flops(
    config: "ModelConfig", caption_tokens: float | None = None, captions: int = 1
) -> float:
    """FLOPs of the forward and backward pass of one image and its captions.

    Counted as the originals compute them: a linear layer costs 2 FLOPs a weight and row, attention
    4 * tokens^2 * width a layer (causal or not), and the backward pass twice the forward, but
    nothing for a locked tower. What this model saves (padding, the last block's rows) is not taken
    off, what it computes again (feature caching, activation checkpointing) is not added: MFU stays
    comparable. caption_tokens: the mean length of captions, for real tokens; None counts padded
    ones. captions: of each image (data.captions = "multi" takes several at once).
    """
    vision, text = config.vision, config.text
    patches = (vision.image_size // vision.patch_size) ** 2
    patches = max(1, int(patches * (1 - vision.patch_dropout)))
    tokens = text.context_length if caption_tokens is None else caption_tokens
    total = 0.0
    for tower, rows, count, locked in (
        (vision, patches + 1, 1, config.lock_image),
        (text, tokens, captions, config.lock_text),
    ):
        layer = (8 + 4 * tower.mlp_ratio) * rows * tower.width**2 + 4 * rows**2 * tower.width
        forward = tower.depth * layer + 2 * tower.width * config.embed_dim
        if tower is vision:
            forward += 2 * patches * 3 * vision.patch_size**2 * vision.width
        total += count * forward * (1 if locked else 3)
    return total


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, by torch.cuda.get_device_name(); None where it is not known."""
    if "MIG" in device_name:  # a part of a GPU
        return None
    found = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name))
    return next(found, None)


def utilization(
    config: "ModelConfig",
    captions: "PackedCaptions",
    images_per_second: float,
    device: torch.device,
) -> dict[str, float]:
    """What one device achieves: TFLOP/s, and their share of its peak (MFU) where that is known.

    captions: of a batch that stands for all. images_per_second: of this device. Returns
    tflops_padded, with every caption counted at the full context, and tflops_real, at the captions'
    mean length; mfu_padded and mfu_real alike.
    """
    *variants, _ = captions.shape
    real = len(captions.token_ids) / math.prod(captions.shape)
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    found = {}
    for name, tokens in (("padded", None), ("real", real)):
        rate = training_flops(config, tokens, math.prod(variants)) * images_per_second
        found[f"tflops_{name}"] = rate / 1e12
        if peak is not None:
            found[f"mfu_{name}"] = rate / peak
    return found
