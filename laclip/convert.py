"""State dicts of other projects, to and from this one's.

open_clip       the models of its own vision transformer (the paper's LAION-400M family), and timm
                trunks inside it (LaCLIP's own family)
laclip_release  the checkpoints of LaCLIP's release (CC3M, CC12M, RedCaps)
hugging_face    CLIPModel, for the open_clip family: it has no qk-norm, no bias of the patch
                convolution, and needs the norm before the first block
timm            to this one's alone: a vision transformer, without its classifier's head, as the
                image tower without its projection
"""

import argparse
import json
import math
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
FORMATS = ("open_clip", "laclip_release", "hugging_face")
# What torch.load and the reader of safetensors raise for files that are cut or of another kind.
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(struct.error, ValueError, KeyError, AttributeError, TypeError),
)


class Rule(NamedTuple):
    """One tensor's name here and there (`*` is a block's number), and how its shape changes.

    change, from here to there: "" none; "transpose"; "patch" [w, 3pp] to [w, 3, p, p]; "lead"
    adds one leading dimension of 1, "leads" two; "scalar" [1] to [].
    """

    ours: str
    theirs: str
    change: str = ""


def _both(ours: str, theirs: str) -> list[Rule]:
    """The rules of a layer with a weight and a bias."""
    return [Rule(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def _blocks(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    return [
        rule
        for name, their_name in names.items()
        for rule in _both(f"{ours}.blocks.*.{name}", f"{theirs}.*.{their_name}")
    ]


_OPENAI_BLOCK = {
    "norm1": "ln_1",
    "attention_out": "attn.out_proj",
    "norm2": "ln_2",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}
_TIMM_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "attention_out": "attn.proj",
    "norm2": "norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
_HUGGING_FACE_BLOCK = {
    "norm1": "layer_norm1",
    "qkv": "self_attn.qkv_proj",  # split into q, k and v afterwards
    "attention_out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}


def _openai_blocks(ours: str, theirs: str) -> list[Rule]:
    fused = [
        Rule(f"{ours}.blocks.*.qkv.{kind}", f"{theirs}.*.attn.in_proj_{kind}")
        for kind in ("weight", "bias")
    ]
    return fused + _blocks(ours, theirs, _OPENAI_BLOCK)


_LOGITS = [Rule("logit_scale", "logit_scale", "scalar"), Rule("logit_bias", "logit_bias", "scalar")]
_OPENAI_TEXT = [
    *_LOGITS,
    Rule("text.token_embedding.weight", "token_embedding.weight"),
    Rule("text.positional_embedding", "positional_embedding"),
    *_openai_blocks("text", "transformer.resblocks"),
    *_both("text.norm", "ln_final"),
    Rule("text.projection.weight", "text_projection", "transpose"),
]
_OPENAI_VISION = [
    Rule("image.patch_embedding.weight", "visual.conv1.weight", "patch"),
    Rule("image.class_embedding", "visual.class_embedding"),
    Rule("image.positional_embedding", "visual.positional_embedding"),
    *_both("image.norm_pre", "visual.ln_pre"),
    *_openai_blocks("image", "visual.transformer.resblocks"),
    *_both("image.norm", "visual.ln_post"),
    Rule("image.projection.weight", "visual.proj", "transpose"),
]


def _timm_vision(trunk: str) -> list[Rule]:
    return [
        Rule("image.patch_embedding.weight", f"{trunk}patch_embed.proj.weight", "patch"),
        Rule("image.patch_embedding.bias", f"{trunk}patch_embed.proj.bias"),
        Rule("image.class_embedding", f"{trunk}cls_token", "leads"),
        Rule("image.positional_embedding", f"{trunk}pos_embed", "lead"),
        *_blocks("image", f"{trunk}blocks", _TIMM_BLOCK),
        *_both("image.norm", f"{trunk}norm"),
    ]


_TIMM_IN_OPEN_CLIP = [
    *_timm_vision("visual.trunk."),
    Rule("image.projection.weight", "visual.head.proj.weight"),
]
_RELEASE_VISION = [
    *_timm_vision("visual."),
    Rule("image.projection.weight", "image_projection", "transpose"),
]
_TIMM = [*_timm_vision(""), *_both("image.norm_pre", "norm_pre")]
# What ViTs of timm have that the image tower has not, by the names of their tensors.
_TIMM_ELSE = {
    "LayerScale": r"blocks\.\d+\.(ls[12]\.gamma|gamma_[12])",
    "register tokens": r"reg_token",
    "average pooling": r"fc_norm\..*",
    "attention pooling": r"attn_pool\..*",
    "a distillation token": r"dist_token",
}
_VISION, _TEXT = "vision_model", "text_model"
_HUGGING_FACE = [
    Rule("logit_scale", "logit_scale", "scalar"),
    Rule("image.patch_embedding.weight", f"{_VISION}.embeddings.patch_embedding.weight", "patch"),
    Rule("image.class_embedding", f"{_VISION}.embeddings.class_embedding"),
    Rule("image.positional_embedding", f"{_VISION}.embeddings.position_embedding.weight"),
    *_both("image.norm_pre", f"{_VISION}.pre_layrnorm"),
    *_blocks("image", f"{_VISION}.encoder.layers", _HUGGING_FACE_BLOCK),
    *_both("image.norm", f"{_VISION}.post_layernorm"),
    Rule("image.projection.weight", "visual_projection.weight"),
    Rule("text.token_embedding.weight", f"{_TEXT}.embeddings.token_embedding.weight"),
    Rule("text.positional_embedding", f"{_TEXT}.embeddings.position_embedding.weight"),
    *_blocks("text", f"{_TEXT}.encoder.layers", _HUGGING_FACE_BLOCK),
    *_both("text.norm", f"{_TEXT}.final_layer_norm"),
    Rule("text.projection.weight", "text_projection.weight"),
]
# Buffers that older versions of the projects stored.
_IGNORED = re.compile(r"(.*\.)?(attn_mask|position_ids)")


def detect_format(state: Mapping[str, Tensor]) -> str:
    """Tells by its keys which project wrote a state dict; ValueError where none is known."""
    state = unwrapped(state)
    if "visual.proj" in state or "visual.trunk.cls_token" in state:
        return "open_clip"
    if "image_projection" in state and "visual.cls_token" in state:
        return "laclip_release"
    if "visual_projection.weight" in state and "text_model.final_layer_norm.weight" in state:
        return "hugging_face"
    if "patch_embed.proj.weight" in state:
        return "timm"
    raise ValueError(
        f"state dict: found keys such as {', '.join(sorted(state)[:4])}, expected those of "
        f"{', '.join(FORMATS)}, or of a ViT of timm"
    )


def unwrapped(state: Mapping[str, Tensor]) -> State:
    """Without what DistributedDataParallel and torch.compile put before the names."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): t for name, t in state.items()}


def to_laclip(state: Mapping[str, Tensor]) -> State:
    """Converts another project's state dict, whose format its keys tell, to this project's.

    Raises ValueError where the format is unknown or keys are left over.
    """
    kind, state = detect_format(state), unwrapped(state)
    known = {name: tensor for name, tensor in state.items() if not _IGNORED.fullmatch(name)}
    if kind == "hugging_face":
        known = _join_qkv(known)
    if kind == "timm":
        known = {n: t for n, t in known.items() if n not in ("head.weight", "head.bias")}
        _check_timm(known)
    timm = "visual.trunk.cls_token" in state
    rules = [rule._replace(ours=rule.theirs, theirs=rule.ours) for rule in _rules(kind, timm)]
    return _rename(known, rules, _TO_OURS, kind)


def from_laclip(state: Mapping[str, Tensor], kind: str) -> State:
    """Converts this project's state dict to the format `kind`, one of FORMATS.

    Raises ValueError where the format cannot hold the model.
    """
    if kind not in FORMATS:
        raise ValueError(f"format: found {kind!r}, expected one of {', '.join(FORMATS)}")
    laclip_family = "image.norm_pre.weight" not in state
    if kind == "laclip_release" and not laclip_family:
        raise ValueError(
            "laclip_release: its vision transformer has no norm before the first block, this "
            "model has. Export to open_clip or hugging_face"
        )
    if kind == "hugging_face" and (laclip_family or "logit_bias" in state):
        raise ValueError(
            "hugging_face: CLIPModel has no qk-norm, no bias of the patch convolution, no "
            "logit_bias, and needs a norm before the first block; this model differs there. "
            "Export to open_clip"
        )
    converted = _rename(state, _rules(kind, laclip_family), _TO_THEIRS, "laclip")
    return _split_qkv(converted) if kind == "hugging_face" else converted


def _check_timm(state: State) -> None:
    """Raises ValueError for a ViT that the image tower cannot be."""
    shapes: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in state.items()}
    patch, places = shapes["patch_embed.proj.weight"], shapes.get("pos_embed", (1, 0, 1))[1]
    mlp_in, mlp_out = (shapes.get(f"blocks.0.mlp.fc{i}.weight", (i,)) for i in (1, 2))
    needed = {
        "square patches of three channels": patch[1:] == (3, patch[-1], patch[-1]),
        "a class token": "cls_token" in shapes,
        "positions of a class token and a square image": math.isqrt(max(0, places - 1)) ** 2
        == places - 1,
        "biases of qkv": "blocks.0.attn.qkv.bias" in shapes,
        "a plain MLP": mlp_in == mlp_out[::-1],
        "a final norm": "norm.weight" in shapes,
    }
    found = [f"lacks {what}" for what, there in needed.items() if not there]
    for what, name in _TIMM_ELSE.items():
        found += [f"has {what}"] if any(re.fullmatch(name, key) for key in shapes) else []
    if found:
        raise ValueError(
            f"timm: this model {', '.join(found)}: laclip's image tower is a plain ViT that reads "
            "its class token, as AugReg's, DeiT and DINO are"
        )


def _rules(kind: str, timm: bool) -> list[Rule]:
    if kind == "timm":
        return _TIMM
    if kind == "hugging_face":
        return _HUGGING_FACE
    if kind == "laclip_release":
        return _RELEASE_VISION + _OPENAI_TEXT
    return (_TIMM_IN_OPEN_CLIP if timm else _OPENAI_VISION) + _OPENAI_TEXT


def _patch(weight: Tensor) -> Tensor:
    side = math.isqrt(weight.shape[1] // 3)
    return weight.reshape(-1, 3, side, side)


_TO_THEIRS = {
    "": lambda t: t,
    "transpose": lambda t: t.T.contiguous(),
    "patch": _patch,
    "lead": lambda t: t[None],
    "leads": lambda t: t[None, None],
    "scalar": lambda t: t.reshape(()),
}
_TO_OURS = _TO_THEIRS | {
    "patch": lambda t: t.flatten(1),
    "lead": lambda t: t[0],
    "leads": lambda t: t[0, 0],
    "scalar": lambda t: t.reshape(1),
}


def _rename(state: Mapping[str, Tensor], rules: list[Rule], changes: dict, kind: str) -> State:
    """Applies rules from their `ours` to their `theirs`; every key must have a rule."""
    by_template = {rule.ours: rule for rule in rules}
    renamed: State = {}
    unknown = []
    for name, tensor in state.items():
        number = re.search(r"\.(\d+)\.", name)
        template = name.replace(f".{number[1]}.", ".*.", 1) if number else name
        rule = by_template.get(template)
        if rule is None:
            unknown.append(name)
            continue
        target = rule.theirs.replace("*", number[1]) if number else rule.theirs
        renamed[target] = changes[rule.change](tensor)
    if unknown:
        raise ValueError(
            f"state dict: {len(unknown)} keys of this {kind} model have no counterpart: "
            f"{', '.join(sorted(unknown)[:5])}. Only vision transformers with a class token and "
            "CLIP's text transformer can be converted"
        )
    return renamed


def _split_qkv(state: State) -> State:
    split: State = {}
    for name, tensor in state.items():
        if ".qkv_proj." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                split[name.replace("qkv_proj", f"{letter}_proj")] = part.clone()
        else:
            split[name] = tensor
    return split


def _join_qkv(state: State) -> State:
    joined: State = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            joined[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = tensor
    return joined


# In a folder, the first of these that is there.
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
    "open_clip_*.safetensors",
    "open_clip_*.bin",
)


def read_checkpoint(path: str | Path, option: str = "checkpoint") -> State:
    """Reads the tensors of a .safetensors file, of a file that torch.save wrote, or of a folder.

    A folder is one as Hugging Face or open_clip write it. Checkpoints with a "state_dict" and
    argparse's Namespace beside it (LaCLIP's release) are read without running code from the file.
    Raises FileNotFoundError and ValueError, whose messages begin with the option that named the
    file.
    """
    path = Path(path)
    if path.is_dir():
        files = next(filter(None, (sorted(path.glob(names)) for names in _WEIGHTS)), [])
        if not files:
            raise FileNotFoundError(f"{option}: none of {', '.join(_WEIGHTS)} in folder {path}")
        return {k: t for file in files for k, t in read_checkpoint(file, option).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{option}: no file {path}")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # The first sentence: what follows in torch's message invites to run the file's code.
        reason = str(error).partition(". ")[0] or "it is empty"
        raise ValueError(
            f"{option}: {path} is damaged, or holds more than tensors and argparse's arguments "
            f"({reason})"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ValueError(f"{option}: {path} holds no state dict of tensors")
    return state


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def _read_safetensors(path: Path) -> State:
    """The format: u64 length of a JSON header, the header, the tensors' bytes."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
        count = (end - begin) // dtype.itemsize
        tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + length + begin)
        state[name] = tensor.reshape(entry["shape"]).clone()
    return state
