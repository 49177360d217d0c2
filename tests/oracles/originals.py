"""open_clip's own model of a run's architecture."""

import open_clip

from laclip.config import ModelConfig


def open_clip_model(config: ModelConfig, **more) -> open_clip.model.CLIP:
    """more: what open_clip's CLIP takes besides, such as init_logit_bias."""
    vision, text = config.vision, config.text
    towers = (
        {
            "image_size": vision.image_size, "patch_size": vision.patch_size,
            "layers": vision.depth, "width": vision.width,
            "head_width": vision.width // vision.heads,
        },
        {
            "context_length": text.context_length, "layers": text.depth, "width": text.width,
            "heads": text.heads,
        },
    )  # fmt: skip
    return open_clip.model.CLIP(config.embed_dim, *towers, **more)
