"""A run's weights for open_clip, Hugging Face or the tools of LaCLIP's release.

laclip export RUN OUT --format open_clip [--checkpoint best]

For open_clip and Hugging Face OUT is a folder that their own from_pretrained takes whole: model,
preprocessing and CLIP's tokenizer.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from laclip.checkpoint import add_checkpoint_option, find_weights, read_weights, save_weights
from laclip.config import Config, load_config
from laclip.convert import FORMATS, from_laclip
from laclip.images import NORMALIZATION
from laclip.tokenizer import ReferenceTokenizer, Tokenizer, load_tokenizer
from laclip.whole_files import whole_folder

WEIGHTS_FILE = {"open_clip": "open_clip_pytorch_model.bin", "hugging_face": "pytorch_model.bin"}
TAKEN_FIRST = {"open_clip": "open_clip_*.safetensors", "hugging_face": "model*.safetensors"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("out", type=Path, help="a folder to write; for laclip_release a file")
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose names and shapes")
    add_checkpoint_option(parser)


def run(args: argparse.Namespace) -> int:
    source = find_weights(args.run_folder, args.checkpoint)
    config = load_config(args.run_folder / "config.toml")
    weights = from_laclip(read_weights(source), args.format)
    tokenizer, out = load_tokenizer(config.data.tokenizer), args.out
    if args.format == "laclip_release":
        if out.is_dir():
            raise ValueError(f"'{out}' is a folder, expected a file to write")
    elif out.is_file():
        raise ValueError(f"'{out}' is a file, expected a folder to write")
    elif found := sorted(out.glob(TAKEN_FIRST[args.format])):
        raise ValueError(
            f"'{found[0]}' would be loaded from there, not the run's weights. Choose another folder"
        )
    files: dict[str, str] = {}
    how = ""
    if args.format == "open_clip":
        settings = open_clip_config(config, tokenizer, "logit_bias" in weights)
        if settings is None:
            how = (
                ". open_clip has no configuration for this model; its weights are for --pretrained"
            )
        else:
            files["open_clip_config.json"] = _json(settings)
            how = f": open_clip.create_model_and_transforms('local-dir:{out}')"
    elif args.format == "hugging_face":
        files = hugging_face_files(config, tokenizer)
        how = f": transformers.CLIPModel.from_pretrained('{out}'), CLIPProcessor likewise"
    if args.format == "laclip_release":
        out.parent.mkdir(parents=True, exist_ok=True)
        save_weights(weights, out)
    else:
        with whole_folder(out) as folder:
            for name, text in files.items():
                (folder / name).write_text(text)
            save_weights(weights, folder / WEIGHTS_FILE[args.format])
    print(f"{out}: {len(weights)} tensors of '{source}' for {args.format}{how}")
    if files and not isinstance(tokenizer, Tokenizer):
        print(f"{out}: without its tokenizer, which is not CLIP's: {config.data.tokenizer}")
    return 0


def _json(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def open_clip_config(config: Config, tokenizer: Any, sigmoid: bool) -> dict[str, Any] | None:
    """The contents of open_clip_config.json; None where open_clip's own ViT is another one."""
    vision, text = config.model.vision, config.model.text
    if vision.qk_norm or vision.patch_bias or not vision.pre_norm:
        return None  # timm's ViT inside open_clip's CLIP, which its configuration cannot ask for
    if vision.activation != text.activation:
        return None

    def tower(part: Any) -> dict[str, Any]:
        sizes = {"width": part.width, "layers": part.depth, "mlp_ratio": part.mlp_ratio}
        return {**sizes, "norm_kwargs": {"eps": part.layer_norm_eps}}

    mean, std = NORMALIZATION[config.data.normalize]
    model: dict[str, Any] = {
        "embed_dim": config.model.embed_dim,
        "quick_gelu": vision.activation == "quick_gelu",
        "vision_cfg": {
            **tower(vision),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.heads,
        },
        "text_cfg": {
            **tower(text),
            "heads": text.heads,
            "context_length": text.context_length,
            "vocab_size": tokenizer.vocab_size,
            "pool_type": "argmax" if text.pool == "eot" else "last",
        },
    }
    if sigmoid:
        model["init_logit_bias"] = -10.0
    images = {"mean": mean, "std": std, "resize_mode": "shortest"}
    images["interpolation"] = {"cubic": "bicubic", "linear": "bilinear"}[config.data.interpolation]
    return {"model_cfg": model, "preprocess_cfg": images}


def hugging_face_files(config: Config, tokenizer: Any) -> dict[str, str]:
    """The files beside the weights of a CLIPModel and its CLIPProcessor, by their names.

    Raises ValueError for a model whose captions CLIPModel would read elsewhere.
    """
    if config.model.text.pool != "eot":
        raise ValueError(
            "hugging_face: CLIPModel reads a caption at its first end-of-text token, this "
            'model at the last place (model.text.pool = "last"). Export to open_clip'
        )
    size = config.model.vision.image_size
    mean, std = NORMALIZATION[config.data.normalize]
    images = {
        "image_processor_type": "CLIPImageProcessor",
        **{f"do_{what}": True for what in ("resize", "center_crop", "rescale", "normalize")},
        "do_convert_rgb": True,
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": {"cubic": 3, "linear": 2}[config.data.interpolation],  # as Pillow counts them
        "image_mean": mean,
        "image_std": std,
    }
    files = {
        "config.json": _json(hugging_face_config(config, tokenizer)),
        "preprocessor_config.json": _json(images),
    }
    if isinstance(tokenizer, Tokenizer):
        bpe = ReferenceTokenizer()
        start, end = bpe.symbols[-2:]
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
        length = config.model.text.context_length
        names = {"tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor"}
        files["tokenizer_config.json"] = _json({**names, **special, "model_max_length": length})
        files["vocab.json"] = json.dumps({symbol: i for i, symbol in enumerate(bpe.symbols)})
        merges = "".join(f"{left} {right}\n" for left, right in bpe.ranks)
        files["merges.txt"] = "#version: 0.2\n" + merges
    return files


def hugging_face_config(config: Config, tokenizer: Any) -> dict[str, Any]:
    """The contents of config.json for a CLIPModel of this architecture."""
    model = config.model

    def tower(part: Any) -> dict[str, Any]:
        return {
            "hidden_size": part.width,
            "intermediate_size": int(part.width * part.mlp_ratio),
            "num_hidden_layers": part.depth,
            "num_attention_heads": part.heads,
            "hidden_act": part.activation,
            "layer_norm_eps": part.layer_norm_eps,
            "projection_dim": model.embed_dim,
        }

    text = {
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": model.text.context_length,
        "bos_token_id": tokenizer.sot_token,
        "eos_token_id": tokenizer.eot_token,
        "pad_token_id": 0,
    }
    vision = {"image_size": model.vision.image_size, "patch_size": model.vision.patch_size}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": model.init_logit_scale,
        "text_config": {"model_type": "clip_text_model", **tower(model.text), **text},
        "vision_config": {"model_type": "clip_vision_model", **tower(model.vision), **vision},
    }
