"""Compares the presets with open_clip, timm and transformers; prints one JSON object a line.

python requirements/oracles.py tests/oracles/parity.py             what test_parity.py reads
python requirements/oracles.py tests/oracles/parity.py PRESET...   features and gradients of these
                                                                   at full depth (H/14: 20 GB)
"""

import contextlib
import dataclasses
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import timm
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize
from torch.utils.flop_counter import FlopCounterMode

import laclip.cli
from laclip import convert
from laclip.config import PRESETS, Config, ModelConfig, TextConfig, VisionConfig, load_config
from laclip.export_weights import hugging_face_config
from laclip.flops import training_flops
from laclip.model import CLIP, build_model
from laclip.model_weights import load_weights
from laclip.tokenizer import load_tokenizer

VOCABULARY, EOT, CONTEXT = 49408, 49407, 77
OPEN_CLIP = {"vit_b_32": "ViT-B-32", "vit_b_16": "ViT-B-16"}
OPEN_CLIP |= {"vit_l_14": "ViT-L-14", "vit_h_14": "ViT-H-14"}
TIMM = {"laclip_vit_s_16": ("vit_small_patch16_224", 12)}
TIMM |= {"laclip_vit_b_16": ("vit_base_patch16_224", 12)}
TIMM |= {"laclip_vit_l_16": ("vit_large_patch16_224", 16)}
# Trained or not, the names tell sizes and what else a model has.
TIMM_TOWERS = ["vit_tiny_patch16_224.augreg_in21k", "vit_small_patch8_224.dino"]
TIMM_TOWERS += ["vit_huge_patch14_clip_quickgelu_224.dfn5b"]
TIMM_TOWERS += ["vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch16_siglip_224.webli"]
TIMM_TOWERS += ["deit_tiny_distilled_patch16_224.fb_in1k", "vit_small_patch16_dinov3.lvd1689m"]
TIMM_TOWERS += ["flexivit_small.1200ep_in1k", "vit_base_patch16_224_miil.in21k"]


def configure(preset: str, depth: int | None) -> ModelConfig:
    values = PRESETS[preset]
    shallow = {} if depth is None else {"depth": depth}
    return ModelConfig(
        embed_dim=values["embed_dim"],
        vision=VisionConfig(**values["vision"] | shallow),
        text=TextConfig(**values["text"] | shallow),
    )


def original(preset: str, depth: int | None) -> torch.nn.Module:
    """The original model from its own package."""
    if preset in OPEN_CLIP:
        config = open_clip.get_model_config(OPEN_CLIP[preset])
        if depth is not None:
            config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = depth
        return open_clip.model.CLIP(**config)
    name, heads = TIMM[preset]
    vision = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    text = {"width": 512, "heads": 8, "layers": depth or 12}
    model = open_clip.model.CLIP(512, vision, text, quick_gelu=True)
    options = {} if depth is None else {"depth": depth}
    trunk = timm.create_model(name, num_classes=0, qk_norm=True, num_heads=heads, **options)
    # The release builds its blocks anew after timm's initialization, and draws the projection so.
    for module in trunk.blocks.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    model.visual.trunk = trunk
    torch.nn.init.normal_(model.visual.head.proj.weight, std=trunk.num_features**-0.5)
    return model


def draw_batch(batch: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(batch, 3, size, size)
    token_ids = torch.zeros(batch, CONTEXT, dtype=torch.int32)
    for row, length in enumerate(np.linspace(3, CONTEXT, batch).astype(int)):
        token_ids[row, 0] = EOT - 1
        token_ids[row, 1 : length - 1] = torch.randint(1, EOT - 1, (int(length) - 2,)).int()
        token_ids[row, length - 1] = EOT
    token_ids[0, 5] = EOT  # a caption is pooled at its first end-of-text token
    return images, token_ids


def contrast(image_features, text_features, scale) -> torch.Tensor:
    logits = scale * image_features @ text_features.T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def compare(preset: str, depth: int | None) -> dict:
    """Features and gradients of both models on the same random weights, in fp32."""
    torch.manual_seed(0)
    theirs = original(preset, depth)
    with torch.no_grad():
        for parameter in theirs.parameters():  # no tensor stays zero or one
            parameter.add_(0.02 * torch.randn_like(parameter))
    ours = build_model(configure(preset, depth), VOCABULARY, EOT)
    ours.load_state_dict(convert.to_laclip(theirs.state_dict()))
    images, token_ids = draw_batch(4, 224)

    *features, scale = ours(images, token_ids)
    contrast(*features, scale).backward()
    expected = (
        theirs.encode_image(images, normalize=True),
        theirs.encode_text(token_ids.long(), normalize=True),
    )
    contrast(*expected, theirs.logit_scale.exp()).backward()
    return {
        "preset": preset,
        "depth": depth or "full",
        "features": largest_error(features, expected),
        "gradients": gradient_error(ours, convert.to_laclip(gradients(theirs))),
    }


def largest_error(found, expected) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, expected))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(model: CLIP, expected: dict[str, torch.Tensor]) -> float:
    """The largest Frobenius error over all parameters, relative to each one's gradient.

    Not below a thousandth of the whole gradient: softmax takes no notice of the bias of the keys'
    norm, so that its gradient is rounding alone.
    """
    found = gradients(model)
    assert found.keys() == expected.keys()
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    errors = [(found[n] - expected[n]).norm() / expected[n].norm().clamp(min=floor) for n in found]
    return float(max(errors))


def count(preset: str) -> dict:
    with torch.device("meta"):
        ours = build_model(configure(preset, None), VOCABULARY, EOT)
        theirs = original(preset, None)
        images, token_ids = torch.zeros(1, 3, 224, 224), torch.zeros(1, CONTEXT, dtype=torch.long)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            theirs(images, token_ids)
    ours_count, theirs_count = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
    return {
        "preset": preset,
        "parameters": ours_count,
        "expected": theirs_count,
        "flops": training_flops(configure(preset, None)),
        "counted_flops": 3 * counter.get_total_flops(),
    }


def initialization(preset: str) -> dict:
    """The largest deviation of a tensor's mean and spread from a fresh original's, in spreads."""
    torch.manual_seed(0)
    ours = build_model(configure(preset, 2), VOCABULARY, EOT).state_dict()
    theirs = convert.to_laclip(original(preset, 2).state_dict())
    worst = {}
    for name, tensor in theirs.items():
        error = max(
            abs(float(tensor.std(correction=0) - ours[name].std(correction=0))),
            abs(float(tensor.mean() - ours[name].mean())),
        )
        worst[name] = error / max(float(tensor.std(correction=0)), 1e-9) * tensor.numel() ** 0.5
    name = max(worst, key=lambda n: worst[n])
    return {"preset": preset, "deviation": worst[name], "tensor": name}


def hugging_face() -> dict:
    """Our weights in a CLIPModel: features, and the way back."""
    torch.manual_seed(0)
    config = configure("vit_b_32", 2)
    vision = dataclasses.replace(config.vision, image_size=64, activation="quick_gelu")
    text = dataclasses.replace(config.text, activation="quick_gelu")
    config = dataclasses.replace(config, vision=vision, text=text)
    ours = build_model(config, VOCABULARY, EOT).eval()
    settings = hugging_face_config(Config(model=config), load_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        weights = convert.from_laclip(ours.state_dict(), "hugging_face")
        torch.save(weights, Path(folder, "pytorch_model.bin"))
        Path(folder, "config.json").write_text(json.dumps(settings))
        theirs = transformers.CLIPModel.from_pretrained(folder).eval()
        theirs.save_pretrained(folder)
        back = convert.to_laclip(convert.read_checkpoint(Path(folder, "model.safetensors")))
    images, token_ids = draw_batch(4, 64)
    with torch.no_grad():
        found = ours(images, token_ids)
        output = theirs(token_ids.long(), images)
    expected = normalize(output.image_embeds, dim=1), normalize(output.text_embeds, dim=1)
    return {
        "features": largest_error(found[:2], expected),
        "scale": (found[2] - theirs.logit_scale.exp()).abs().item(),
        "back": all(torch.equal(back[n], t) for n, t in ours.state_dict().items()),
    }


def timm_tower(name: str) -> dict:
    """The class token before the projection, of random weights, or why it is refused."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=2).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # no tensor stays zero or one
            parameter.add_(0.02 * torch.randn_like(parameter))
    with tempfile.TemporaryDirectory() as folder:
        timm.models.save_for_hf(theirs, folder)
        out, err = io.StringIO(), io.StringIO()
        words = ["import", folder, str(Path(folder, "w.pt")), "--tower", "image"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = laclip.cli.main(words)
        if code:
            return {"preset": name, "refused": err.getvalue()}
        Path(folder, "run.toml").write_text(out.getvalue().partition("\n\n")[2])
        config = load_config(Path(folder, "run.toml"))
        ours = build_model(config.model, VOCABULARY, EOT).eval()
        fresh = load_weights(ours, config.model.weights)
    images = torch.randn(2, 3, config.model.vision.image_size, config.model.vision.image_size)
    with torch.no_grad():
        found = ours.image.pool(images)
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    error = largest_error([found], [expected])
    return {"preset": name, "features": error, "fresh": fresh, "normalize": config.data.normalize}


def main() -> None:
    logging.disable()
    for preset in sys.argv[1:]:
        print(json.dumps({"parity": compare(preset, None)}), flush=True)
    if sys.argv[1:]:
        return
    for preset in (*OPEN_CLIP, *TIMM):
        print(json.dumps({"count": count(preset)}), flush=True)
    # The largest at depth 2, for time; depth repeats the same block.
    deep = ("vit_b_32", "laclip_vit_s_16")
    for preset in (*OPEN_CLIP, *TIMM):
        print(json.dumps({"parity": compare(preset, None if preset in deep else 2)}), flush=True)
    for preset in deep:  # one of each family
        print(json.dumps({"initialization": initialization(preset)}), flush=True)
    print(json.dumps({"hugging_face": hugging_face()}), flush=True)
    for name in TIMM_TOWERS:
        print(json.dumps({"timm": timm_tower(name)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
