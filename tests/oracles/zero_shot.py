"""open_clip's own zero-shot evaluation of an exported model; prints its scores as JSON.

python requirements/oracles.py tests/oracles/zero_shot.py WEIGHTS CONFIG.toml CLASS_FOLDERS
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import open_clip
import torch
from open_clip.transform import image_transform
from open_clip_train.zero_shot import run
from originals import open_clip_model
from PIL import Image

from laclip.config import load_config


def main() -> None:
    weights, settings, data = sys.argv[1:]
    config = load_config(settings).model
    model = open_clip_model(config).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    transform = image_transform(config.vision.image_size, is_train=False)
    folders = sorted(Path(data).iterdir())
    images, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            images.append(transform(Image.open(file)))
            labels.append(label)
    batches = list(zip(torch.stack(images).split(64), torch.tensor(labels).split(64)))
    tokenizer = open_clip.SimpleTokenizer(context_length=config.text.context_length)
    args = Namespace(device="cpu", precision="fp32", batch_size=64)
    found = {}
    for name, templates in (
        ("simple", open_clip.SIMPLE_IMAGENET_TEMPLATES),
        ("openai", open_clip.OPENAI_IMAGENET_TEMPLATES),
    ):
        with torch.no_grad():
            classifier = open_clip.build_zero_shot_classifier(
                model, tokenizer, [folder.name.replace("_", " ") for folder in folders], templates
            )
        top1, top5 = run(model, classifier, batches, args)
        found[name] = {"top1": top1, "top5": top5, "classifier": classifier.T.tolist()}
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
