"""Fused contrastive losses, installed as laclip.kernels."""

if __name__ != "laclip.kernels":
    raise ImportError(
        "this folder is the package laclip.kernels, not a top-level 'kernels' (a name that "
        "Hugging Face owns). Install with 'pip install -e .' and import laclip.kernels."
    )

from laclip.kernels.clip_loss import clip_loss
from laclip.kernels.gather import GatheredFeatures, start_gather
from laclip.kernels.siglip_loss import siglip_loss

__all__ = ["GatheredFeatures", "clip_loss", "siglip_loss", "start_gather"]
