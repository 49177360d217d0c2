"""State dicts to and from other projects' names; the real packages are in test_parity.py."""

import argparse

import pytest
import torch

from laclip import convert
from laclip.config import PRESETS, ModelConfig, TextConfig, VisionConfig
from laclip.model import build_model


def weights(preset, siglip=False):
    vision = PRESETS[preset]["vision"] | {"width": 24, "heads": 2, "depth": 2, "image_size": 56}
    text = PRESETS[preset]["text"] | {"width": 16, "heads": 2, "depth": 11}
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=8, vision=VisionConfig(**vision), text=TextConfig(**text))
    return build_model(config, 50, 49, siglip=siglip).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("preset", "kind", "siglip"),
    [
        ("vit_l_14", "open_clip", False),
        ("vit_l_14", "open_clip", True),
        ("vit_l_14", "hugging_face", False),
    ],
)
def test_conversion_there_and_back_changes_nothing(preset, kind, siglip):
    state = weights(preset, siglip)
    converted = convert.from_laclip(state, kind)
    assert convert.detect_format(converted) == kind
    assert same(convert.to_laclip(converted), state)


@pytest.mark.parametrize("kind", ["open_clip", "laclip_release"])
def test_laclips_family_converts_there_and_back(kind):
    vision = PRESETS["laclip_vit_s_16"]["vision"] | {"width": 24, "heads": 2, "depth": 2}
    config = ModelConfig(
        embed_dim=8,
        vision=VisionConfig(**vision | {"image_size": 32}),
        text=TextConfig(width=16, heads=2, depth=2, activation="quick_gelu"),
    )
    state = build_model(config, 50, 49).state_dict()
    assert same(convert.to_laclip(convert.from_laclip(state, kind)), state)


# The names and shapes of LaCLIP's release (its models.py), ViT-B/16 with one block a tower.
RELEASE = {
    "visual.cls_token": [1, 1, 768],
    "visual.pos_embed": [1, 197, 768],
    "visual.patch_embed.proj.weight": [768, 3, 16, 16],
    "visual.patch_embed.proj.bias": [768],
    "visual.blocks.0.norm1.weight": [768],
    "visual.blocks.0.norm1.bias": [768],
    "visual.blocks.0.attn.qkv.weight": [2304, 768],
    "visual.blocks.0.attn.qkv.bias": [2304],
    "visual.blocks.0.attn.q_norm.weight": [64],
    "visual.blocks.0.attn.q_norm.bias": [64],
    "visual.blocks.0.attn.k_norm.weight": [64],
    "visual.blocks.0.attn.k_norm.bias": [64],
    "visual.blocks.0.attn.proj.weight": [768, 768],
    "visual.blocks.0.attn.proj.bias": [768],
    "visual.blocks.0.norm2.weight": [768],
    "visual.blocks.0.norm2.bias": [768],
    "visual.blocks.0.mlp.fc1.weight": [3072, 768],
    "visual.blocks.0.mlp.fc1.bias": [3072],
    "visual.blocks.0.mlp.fc2.weight": [768, 3072],
    "visual.blocks.0.mlp.fc2.bias": [768],
    "visual.norm.weight": [768],
    "visual.norm.bias": [768],
    "image_projection": [768, 512],
    "text_projection": [512, 512],
    "logit_scale": [],
    "token_embedding.weight": [49408, 512],
    "positional_embedding": [77, 512],
    "ln_final.weight": [512],
    "ln_final.bias": [512],
    "transformer.resblocks.0.ln_1.weight": [512],
    "transformer.resblocks.0.ln_1.bias": [512],
    "transformer.resblocks.0.ln_2.weight": [512],
    "transformer.resblocks.0.ln_2.bias": [512],
    "transformer.resblocks.0.attn.in_proj_weight": [1536, 512],
    "transformer.resblocks.0.attn.in_proj_bias": [1536],
    "transformer.resblocks.0.attn.out_proj.weight": [512, 512],
    "transformer.resblocks.0.attn.out_proj.bias": [512],
    "transformer.resblocks.0.mlp.c_fc.weight": [2048, 512],
    "transformer.resblocks.0.mlp.c_fc.bias": [2048],
    "transformer.resblocks.0.mlp.c_proj.weight": [512, 2048],
    "transformer.resblocks.0.mlp.c_proj.bias": [512],
}


def test_release_checkpoint_with_its_pickled_arguments_loads_into_the_preset(tmp_path):
    state = {f"module.{name}": torch.randn(shape) for name, shape in RELEASE.items()}
    path = tmp_path / "cc12m_laclip.pt"
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1e-3)}, path)
    preset = PRESETS["laclip_vit_b_16"]
    config = ModelConfig(
        embed_dim=preset["embed_dim"],
        vision=VisionConfig(**preset["vision"] | {"depth": 1}),
        text=TextConfig(**preset["text"] | {"depth": 1}),
    )
    with torch.device("meta"):
        model = build_model(config, 49408, 49407)
    loaded = convert.to_laclip(convert.read_checkpoint(path))
    model.load_state_dict(loaded, assign=True)
    assert torch.equal(
        model.image.projection.weight, state["module.image_projection"].T.contiguous()
    )
    back = convert.from_laclip(model.state_dict(), "laclip_release")
    assert same(back, {name.removeprefix("module."): t for name, t in state.items()})


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {}, "args": tmp_path.joinpath}, path)
    with pytest.raises(ValueError, match=r"evil\.pt is damaged, or holds more than tensors"):
        convert.read_checkpoint(path)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_cut_anywhere_is_named(ending, tmp_path):
    path = tmp_path / f"short.{ending}"
    torch.save({"a": torch.zeros(10000)}, path)
    if ending == "safetensors":
        header = b'{"a": {"dtype": "F32", "shape": [10000], "data_offsets": [0, 40000]}}'
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40000))
    assert convert.read_checkpoint(path)["a"].shape == (10000,)
    whole = path.read_bytes()
    for size in (0, 1, 5, 40, 200, 10000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=rf"^checkpoint: .*short\.{ending} is damaged"
        ) as error:
            convert.read_checkpoint(path)
        assert "weights_only" not in str(error.value)


def test_a_file_without_tensors_or_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "list.pt"
    for content in ([1, 2], {"state_dict": 3}, {"a": 1}, torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"^model\.weights: .*list\.pt holds no state dict"):
            convert.read_checkpoint(path, "model.weights")
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.pt"):
        convert.read_checkpoint(tmp_path / "absent.pt")


def test_formats_that_cannot_hold_the_model_are_refused():
    with pytest.raises(ValueError, match="hugging_face: CLIPModel has no qk-norm"):
        convert.from_laclip(weights_of_laclips_family(), "hugging_face")
    with pytest.raises(ValueError, match="Export to open_clip"):
        convert.from_laclip(weights("vit_l_14", siglip=True), "hugging_face")
    with pytest.raises(ValueError, match="laclip_release: its vision transformer"):
        convert.from_laclip(weights("vit_l_14"), "laclip_release")
    with pytest.raises(ValueError, match="expected one of open_clip, laclip_release"):
        convert.from_laclip(weights("vit_l_14"), "onnx")


def weights_of_laclips_family():
    return {name: t for name, t in weights("vit_l_14").items() if "norm_pre" not in name}


def timm_vit():
    """A ViT as timm names it, and the image tower that it is."""
    image = {
        name: tensor
        for name, tensor in weights("vit_l_14").items()
        if name.startswith("image.") and "projection" not in name
    }
    rules = convert._rules("timm", True)
    return convert._rename(image, rules, convert._TO_THEIRS, "laclip"), image


def test_a_vit_of_timm_becomes_the_image_tower_but_for_its_head():
    theirs, image = timm_vit()
    assert convert.detect_format(theirs) == "timm"
    assert same(convert.to_laclip(theirs | {"head.weight": torch.zeros(10, 24)}), image)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"blocks.0.ls1.gamma": [24]}, "has LayerScale"),
        ({"reg_token": [1, 4, 24]}, "has register tokens"),
        ({"fc_norm.weight": [24], "norm.weight": None}, "lacks a final norm, has average pooling"),
        ({"cls_token": None}, "lacks a class token"),
        ({"pos_embed": [1, 9, 24]}, "lacks positions of a class token and a square image"),
        ({"blocks.0.attn.qkv.bias": None}, "lacks biases of qkv"),
        ({"blocks.0.mlp.fc2.weight": [24, 48]}, "lacks a plain MLP"),  # SwiGLU halves it
        ({"patch_embed.proj.weight": [24, 1, 14, 14]}, "lacks square patches of three channels"),
        ({"rel_pos.weight": [4]}, "keys of this timm model have no counterpart"),
    ],
)
def test_a_vit_that_the_image_tower_cannot_be_is_refused_by_name(change, reason):
    theirs, _ = timm_vit()
    theirs |= {name: torch.zeros(shape) for name, shape in change.items() if shape}
    theirs = {name: tensor for name, tensor in theirs.items() if change.get(name, True)}
    with pytest.raises(ValueError, match=reason):
        convert.to_laclip(theirs)


def test_unknown_keys_are_named():
    state = convert.from_laclip(weights("vit_l_14"), "open_clip")
    with pytest.raises(ValueError, match=r"visual\.attn_pool\.query"):
        convert.to_laclip(state | {"visual.attn_pool.query": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"head\.weight"):  # a classifier's, which only timm's have
        convert.to_laclip(state | {"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="expected those of open_clip"):
        convert.to_laclip({"fc.weight": torch.zeros(1)})


def test_buffers_of_older_versions_are_dropped():
    state = weights("vit_l_14")
    old = convert.from_laclip(state, "hugging_face")
    old["text_model.embeddings.position_ids"] = torch.arange(77)
    assert same(convert.to_laclip(old), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_are_found_behind_the_wrappers_of_training(prefix):
    state = weights("vit_l_14")
    theirs = convert.from_laclip(state, "open_clip")
    wrapped = {prefix + name: tensor for name, tensor in theirs.items()}
    assert convert.detect_format(wrapped) == "open_clip"
    assert same(convert.to_laclip(wrapped), state)


def test_a_folder_is_read_whole(tmp_path):
    state = convert.from_laclip(weights("vit_l_14"), "hugging_face")
    with pytest.raises(FileNotFoundError, match=r"none of model\*\.safetensors, .* in folder"):
        convert.read_checkpoint(tmp_path)
    for number in (0, 1):
        part = {name: state[name] for name in sorted(state)[number::2]}
        torch.save(part, tmp_path / f"pytorch_model-0000{number + 1}-of-00002.bin")
    assert same(convert.read_checkpoint(tmp_path), state)
