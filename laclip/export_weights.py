"""A run's weights for open_clip, Hugging Face or the tools of LaCLIP's release.

laclip export RUN OUT --format open_clip [--checkpoint best]
"""

import argparse
import json
from pathlib import Path

from laclip.checkpoint import add_checkpoint_option, find_weights, read_weights, save_weights
from laclip.config import load_config
from laclip.convert import FORMATS, from_laclip, hugging_face_config
from laclip.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("out", type=Path, help="a file; for hugging_face a folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="whose names and shapes")
    add_checkpoint_option(parser)


def run(args: argparse.Namespace) -> int:
    source = find_weights(args.run_folder, args.checkpoint)
    config = load_config(args.run_folder / "config.toml")
    converted = from_laclip(read_weights(source), args.format)
    out = args.out
    if args.format == "hugging_face":
        if config.model.text.pool != "eot":
            raise ValueError(
                "hugging_face: CLIPModel reads a caption at its first end-of-text token, this "
                'model at the last place (model.text.pool = "last"). Export to open_clip'
            )
        tokenizer = load_tokenizer(config.data.tokenizer)
        out.mkdir(parents=True, exist_ok=True)
        settings = hugging_face_config(config.model, tokenizer.vocab_size, tokenizer.eot_token)
        (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        out = out / "pytorch_model.bin"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_weights(converted, out)
    print(f"{out}: {len(converted)} tensors of '{source}' for {args.format}")
    return 0
