"""The slow twins: what the losses mean, in plain PyTorch that anyone can check by eye.

They hold whole similarity matrices. Half-precision features are widened to fp32 first, so that the
twin is the better of the two; float64 is taken as it is.
"""

from typing import Any

import torch
import torch.nn.functional as F

from laclip.kernels.gather import GatherWithGradient


def _gathered(
    image_features: torch.Tensor, text_features: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Widened own and gathered features (text with a variants axis), and the rank's first row."""
    wide = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    image = image_features.to(wide)
    text = text_features.to(wide)
    text = text if text.dim() == 3 else text[None]
    if group is None:
        return image, text, image, text, 0
    all_images = GatherWithGradient.apply(image, group)
    all_texts = GatherWithGradient.apply(text, group)
    return image, text, all_images, all_texts, torch.distributed.get_rank(group) * len(image)


def _finite_or_nan(loss: torch.Tensor) -> torch.Tensor:
    return torch.where(loss.isfinite(), loss, torch.nan)


def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    *,
    group: Any = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """clip_loss as cross-entropies of whole matrices; arguments as in laclip.kernels.clip_loss."""
    image, text, all_images, all_texts, first = _gathered(image_features, text_features, group)
    target = torch.arange(len(image), device=image.device) + first
    total = image.new_zeros(())
    for variant, all_variant in zip(text, all_texts):
        by_image = logit_scale * image @ all_variant.T
        by_text = logit_scale * variant @ all_images.T
        total = total + (
            F.cross_entropy(by_image, target, label_smoothing=label_smoothing)
            + F.cross_entropy(by_text, target, label_smoothing=label_smoothing)
        )
    return _finite_or_nan(total / (2 * len(text)))


def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    group: Any = None,
) -> torch.Tensor:
    """siglip_loss from a whole matrix of labels; arguments as in laclip.kernels.siglip_loss."""
    image, text, _, all_texts, first = _gathered(image_features, text_features, group)
    rows = torch.arange(len(image), device=image.device) + first
    columns = torch.arange(all_texts.shape[1], device=image.device)
    labels = torch.where(rows[:, None] == columns[None, :], 1.0, -1.0).to(image.dtype)
    total = image.new_zeros(())
    for all_variant in all_texts:
        logits = logit_scale * image @ all_variant.T + logit_bias
        total = total - F.logsigmoid(labels * logits).sum() / len(image)
    return _finite_or_nan(total / len(text))
