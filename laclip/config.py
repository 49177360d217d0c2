"""The configuration of a run: frozen dataclasses, each knob in one home."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a vision transformer with a class token and learned positions."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # gelu | quick_gelu
    qk_norm: bool = False  # LayerNorm over head_dim on queries and keys (eps 1e-6)
    pre_norm: bool = True  # a LayerNorm before the first block (OpenAI's ln_pre)
    patch_bias: bool = False  # bias of the patch convolution
    layer_norm_eps: float = 1e-5
    patch_dropout: float = 0.0  # share of patches left out in training


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a causal transformer."""

    context_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # gelu | quick_gelu
    layer_norm_eps: float = 1e-5
    pool: str = "eot"  # eot: at the first end-of-text token | last: at the last token


@dataclass(frozen=True)
class ModelConfig:
    """Two towers and their common embedding. A preset fills what the file leaves out."""

    preset: str = ""
    embed_dim: int = 512
    attention: str = "sdpa"  # sdpa | flash_attn | xformers
    init_logit_scale: float = 2.6592600369327783  # ln(1 / 0.07)
    activation_checkpointing: bool = False
    lock_image: bool = False  # LiT: the image tower's parameters stay as they are
    lock_text: bool = False
    weights: str = ""  # start from this checkpoint file
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


def _preset(embed_dim, patch, width, depth, heads, text_width, text_depth, text_heads, **more):
    vision = {"patch_size": patch, "width": width, "depth": depth, "heads": heads}
    text = {"width": text_width, "depth": text_depth, "heads": text_heads}
    vision |= more.get("vision", {})
    text |= more.get("text", {})
    return {"embed_dim": embed_dim, "vision": vision, "text": text}


_LACLIP = {
    "vision": {"qk_norm": True, "pre_norm": False, "patch_bias": True, "layer_norm_eps": 1e-6},
    "text": {"activation": "quick_gelu"},
}

# The paper's two families: its own models (CC3M, CC12M, RedCaps) and open_clip's (LAION-400M).
PRESETS = {
    "laclip_vit_s_16": _preset(512, 16, 384, 12, 12, 512, 12, 8, **_LACLIP),
    "laclip_vit_b_16": _preset(512, 16, 768, 12, 12, 512, 12, 8, **_LACLIP),
    "laclip_vit_l_16": _preset(512, 16, 1024, 24, 16, 512, 12, 8, **_LACLIP),
    "vit_b_32": _preset(512, 32, 768, 12, 12, 512, 12, 8),
    "vit_b_16": _preset(512, 16, 768, 12, 12, 512, 12, 8),
    "vit_l_14": _preset(768, 14, 1024, 24, 16, 768, 12, 12),
    "vit_h_14": _preset(1024, 14, 1280, 32, 16, 1024, 24, 16),
}
