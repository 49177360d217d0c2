"""Weights of open_clip, Hugging Face, LaCLIP's release or a ViT of timm, for `model.weights`.

laclip import FILE OUT.pt
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from laclip.checkpoint import save_weights
from laclip.config import PRESETS, DataConfig, TextConfig, VisionConfig
from laclip.convert import State, detect_format, read_checkpoint, to_laclip
from laclip.images import NORMALIZATION

Settings = dict[str, dict[str, Any]]
TOWERS: dict[str, Any] = {"vision": VisionConfig, "text": TextConfig}
UNTOLD = """\
# Weights alone do not tell the activation: OpenAI's, and open_clip's models named -quickgelu, need
# activation = "quick_gelu" in [model.vision] and [model.text]. Nor do they tell an image tower that
# averages its tokens: laclip's reads the class token."""
NO_PROJECTION = """\
# embed_dim is yours to choose: the projection to it begins anew, and is trained, with
# lock_image = true (LiT) too."""
UNTOLD_IMAGES = """
# Nothing here tells the images' mean and deviation: OpenAI's are assumed. Others need
# normalize = "imagenet" or "inception" (0.5) in [data]."""
RESAMPLING = {"bicubic": "cubic", 3: "cubic", "bilinear": "linear", 2: "linear"}  # as Pillow counts


class Images(NamedTuple):
    """How a model's images are made: mean and deviation in [0, 1], and how they are resized."""

    mean: Sequence[float]
    std: Sequence[float]
    resampling: str | int
    unlike: str = ""  # what laclip does otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        type=Path,
        help="a .safetensors file, one of torch.save, or a folder as Hugging Face, open_clip or "
        "timm write it, whose configuration is then read too",
    )
    parser.add_argument("out", type=Path, help="where to write; set model.weights to it")
    parser.add_argument(
        "--tower", choices=("image", "text"), help="this one alone: the rest of a run starts anew"
    )


def run(args: argparse.Namespace) -> int:
    state = read_checkpoint(args.file)
    kind, converted = detect_format(state), to_laclip(state)
    if args.tower:
        kept = f"{args.tower}."
        converted = {name: tensor for name, tensor in converted.items() if name.startswith(kept)}
    if not converted:
        raise ValueError(
            f"--tower {args.tower}: '{args.file}' of {kind} holds no {args.tower} tower"
        )
    folder = args.file if args.file.is_dir() else args.file.parent
    told = read_settings(folder, kind)
    images = "" if args.tower == "text" else data_section(folder, kind)
    section = model_section(converted, told)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(converted, args.out)
    numbers = sum(tensor.numel() for tensor in converted.values())
    print(f"{args.out}: {numbers / 1e6:.1f} M numbers, from {kind}. For the run's configuration:\n")
    print(f"[model]\nweights = {json.dumps(str(args.out), ensure_ascii=False)}\n{section}")
    if not told and "image.norm_pre.weight" in converted:
        print(UNTOLD)
    if images != "":
        print(UNTOLD_IMAGES if images is None else images)
    return 0


def read_settings(folder: Path, kind: str) -> Settings:
    """What weights do not tell, by tower, from the configuration beside them; {} without one.

    Raises ValueError where it asks for what laclip's towers do not compute.
    """
    if kind == "laclip_release":
        return {"text": {"activation": "quick_gelu"}}
    file = folder / ("open_clip_config.json" if kind == "open_clip" else "config.json")
    read = {"open_clip": _open_clips, "hugging_face": _hugging_faces, "timm": _timms}[kind]
    return _read(file, kind, read) if file.is_file() else {}


def _read(file: Path, kind: str, read: Callable[[Path, Any], Any]) -> Any:
    try:
        return read(file, json.loads(file.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{file}' is no configuration of {kind} ({error!r}). Restore it, or take it away and "
            "set yourself what it would tell"
        ) from None


def _hugging_faces(file: Path, content: dict[str, Any]) -> Settings:
    told = {}
    for tower, heads in (("vision", 12), ("text", 8)):
        found = content[f"{tower}_config"]
        told[tower] = {
            "heads": found.get("num_attention_heads", heads),
            "activation": _known(file, "hidden_act", found, ("quick_gelu", "gelu")),
            "layer_norm_eps": found.get("layer_norm_eps", 1e-5),
        }
    return told


def _open_clips(file: Path, content: dict[str, Any]) -> Settings:
    model = content["model_cfg"]
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "timm_model_name" in vision:
        return {}
    _known(file, "pool_type", vision, ("tok",))
    _known(file, "no_causal_mask", text, (False,))
    told = {
        "vision": {"heads": vision.get("width", 768) // vision.get("head_width", 64)},
        "text": {
            "heads": text.get("heads", 8),
            "pool": _known(file, "pool_type", text, ("argmax", "last")).replace("argmax", "eot"),
        },
    }
    for tower, found in (("vision", vision), ("text", text)):
        _known(file, "act_kwargs", found, (None, {}))
        told[tower] |= {
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "layer_norm_eps": (found.get("norm_kwargs") or {}).get("eps", 1e-5),
        }
    return told


def _timms(file: Path, content: dict[str, Any]) -> Settings:
    _known(file, "global_pool", content, ("token", ""))
    given = content.get("model_args") or {}
    told = {"heads": given["num_heads"]} if "num_heads" in given else {}
    quick = "quickgelu" in content["architecture"]
    return {"vision": {"activation": "quick_gelu" if quick else "gelu"} | told}


def _known(file: Path, key: str, found: dict[str, Any], values: tuple[Any, ...]) -> Any:
    """The value of a key, the first of `values` where it is not given."""
    value = found.get(key, values[0])
    if value not in values:
        raise ValueError(
            f"'{file}': found {key} {value!r}, expected {' or '.join(map(repr, values))}: "
            "laclip's towers compute nothing else"
        )
    return value


def data_section(folder: Path, kind: str) -> str | None:
    """Lines that make a run's images those of the model, from the configuration beside the weights.

    "" where the defaults do, None where no file tells. What laclip has not stands in comments.
    """
    files = IMAGE_FILES.get(kind, {})
    file = next((folder / name for name in files if (folder / name).is_file()), None)
    if kind == "laclip_release":
        lines = _data_lines(Images(*NORMALIZATION["imagenet"], "bilinear"))
    elif file is None:
        return None
    else:
        lines = _read(file, kind, lambda file, content: _data_lines(files[file.name](content)))
    return "\n".join(["\n[data]", *lines]) if lines else ""


def _data_lines(found: Images) -> list[str]:
    lines = []
    for normalize, (mean, std) in NORMALIZATION.items():
        pairs = zip((*found.mean, *found.std), (*mean, *std))
        if all(math.isclose(theirs, ours, abs_tol=1e-4) for theirs, ours in pairs):
            lines += [f'normalize = "{normalize}"'] if normalize != DataConfig.normalize else []
            break
    else:
        lines.append(
            f"# mean {list(found.mean)}, deviation {list(found.std)}: normalize has "
            f"{', '.join(NORMALIZATION)} alone, so that features will differ"
        )
    interpolation = RESAMPLING.get(found.resampling)
    if interpolation is None:
        lines.append(f"# interpolation {found.resampling!r}: laclip has cubic and linear alone")
    elif interpolation != DataConfig.interpolation:
        lines.append(f'interpolation = "{interpolation}"')
    if found.unlike:
        lines.append(
            f"# {found.unlike}: laclip resizes the shorter side to the model's size, cuts the "
            "centre and normalizes, so that scores may differ"
        )
    return lines


def _open_clips_images(content: dict[str, Any]) -> Images:
    found = content.get("preprocess_cfg") or {}
    mode = found.get("resize_mode", "shortest")
    unlike = "" if mode == "shortest" else f"resize_mode {mode!r}"
    mean, std = _channels(found, "mean", "std")
    return Images(mean, std, found.get("interpolation", "bicubic"), unlike)


def _hugging_faces_images(content: dict[str, Any]) -> Images:
    found = content.get("image_processor", content)
    size, crop = found.get("size"), found.get("crop_size")
    side = size.get("shortest_edge", 0) if isinstance(size, dict) else size  # 0: each side its own
    cut = crop.get("height") if isinstance(crop, dict) else crop
    told = [f"size {size}, crop_size {crop}"] if side != cut else []
    steps = (f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize"))
    told += [f"{step} false" for step in steps if not found.get(step, True)]
    mean, std = _channels(found, "image_mean", "image_std")
    return Images(mean, std, found.get("resample", 3), ", ".join(told))


def _channels(found: dict[str, Any], mean: str, std: str) -> tuple[list[float], ...]:
    """Mean and deviation by channel: OpenAI's where none are given, one number for all three."""
    given = (found.get(mean), found.get(std))
    values = [ours if v is None else v for v, ours in zip(given, NORMALIZATION["openai"])]
    return tuple([v] * 3 if isinstance(v, (int, float)) else list(v) for v in values)


def _timms_images(content: dict[str, Any]) -> Images:
    found = content["pretrained_cfg"]
    share, mode = found.get("crop_pct", 0.875), found.get("crop_mode", "center")
    unlike = "" if (share, mode) == (1.0, "center") else f"crop_pct {share}, crop_mode {mode!r}"
    return Images(found["mean"], found["std"], found.get("interpolation", "bicubic"), unlike)


IMAGE_FILES: dict[str, dict[str, Callable[[dict[str, Any]], Images]]] = {
    "open_clip": {"open_clip_config.json": _open_clips_images},
    "hugging_face": {
        "preprocessor_config.json": _hugging_faces_images,
        "processor_config.json": _hugging_faces_images,
    },
    "timm": {"config.json": _timms_images},
}


def model_section(state: State, told: Settings) -> str:
    """Lines that make a run's model the one of these weights, [model] being open already."""
    towers: Settings = {}
    if "image.norm.weight" in state:
        patch = math.isqrt(state["image.patch_embedding.weight"].shape[1] // 3)
        side = math.isqrt(len(state["image.positional_embedding"]) - 1) * patch
        towers["vision"] = _sizes(state, "image") | {
            "image_size": side,
            "patch_size": patch,
            "qk_norm": "image.blocks.0.q_norm.weight" in state,
            "pre_norm": "image.norm_pre.weight" in state,
            "patch_bias": "image.patch_embedding.bias" in state,
        }
        if "image.norm_pre.weight" not in state:
            towers["vision"]["layer_norm_eps"] = 1e-6  # timm's
    if "text.norm.weight" in state:
        length = len(state["text.positional_embedding"])
        towers["text"] = _sizes(state, "text") | {"context_length": length}
    projections = [len(state[name]) for name in state if name.endswith(".projection.weight")]
    preset = _find_preset(projections[0], towers) if projections else ""
    if projections:
        lines = [f'preset = "{preset}"' if preset else f"embed_dim = {projections[0]}"]
    else:
        lines = [NO_PROJECTION]
    for name, sizes in towers.items():
        default = TOWERS[name](**PRESETS[preset][name] if preset else {})
        heads = {} if preset else {"heads": _heads(state, name, sizes["width"])}
        changed = [
            f"{key} = {json.dumps(value)}"
            for key, value in (sizes | heads | told.get(name, {})).items()
            if value != getattr(default, key)
        ]
        if changed:
            lines += [f"\n[model.{name}]", *changed]
    if "logit_bias" in state:
        lines += ["\n[train]", 'loss = "siglip"']
    return "\n".join(lines)


def _heads(state: State, tower: str, width: int) -> int:
    """As many as the known models of this width have."""
    if tower == "vision" and width >= 1280:  # ViT-H, -g and -G
        return 16
    norm = state.get("image.blocks.0.q_norm.weight") if tower == "vision" else None
    return max(1, width // (64 if norm is None else len(norm)))


def _find_preset(embed_dim: int, towers: Settings) -> str:
    """The preset of both towers, but for the sizes of images and captions; "" where none is."""
    if len(towers) == 2:
        for name, preset in PRESETS.items():
            if preset["embed_dim"] == embed_dim and all(
                getattr(TOWERS[tower](**preset[tower]), key) == value
                for tower, sizes in towers.items()
                for key, value in sizes.items()
                if key not in ("image_size", "context_length")
            ):
                return name
    return ""


def _sizes(state: State, tower: str) -> dict[str, Any]:
    width = len(state[f"{tower}.norm.weight"])
    ratio = len(state[f"{tower}.blocks.0.mlp_in.weight"]) / width
    depth = len({name.split(".")[2] for name in state if name.startswith(f"{tower}.blocks.")})
    return {"width": width, "depth": depth, "mlp_ratio": ratio}
