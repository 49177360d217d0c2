"""open_clip's own zero-shot evaluation of an exported model; prints its scores as JSON.

python requirements/oracles.py tests/oracles/zero_shot.py OPEN_CLIP HUGGING_FACE CLASS_FOLDERS

OPEN_CLIP, HUGGING_FACE: folders that `laclip export` wrote, each loaded by its own project, with
preprocessing and tokenizer. "hugging_face": the largest difference of a probability between them.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path

import open_clip
import torch
from open_clip_train.zero_shot import run
from PIL import Image
from transformers import CLIPModel, CLIPProcessor


def main() -> None:
    exported, hugging_face, data = sys.argv[1:]
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    model.eval()
    folders = sorted(Path(data).iterdir())
    images, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir()):
            images.append(transform(Image.open(file)))
            labels.append(label)
    batches = list(zip(torch.stack(images).split(64), torch.tensor(labels).split(64)))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{exported}")
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
    names = [f"A drawing of: {folder.name.replace('_', ' ')}, isn't it?" for folder in folders]
    files = [next(folder.iterdir()) for folder in folders]
    pictures = torch.stack([transform(Image.open(file)) for file in files])
    processor = CLIPProcessor.from_pretrained(hugging_face)
    pictures_of = {"images": [Image.open(file) for file in files], "return_tensors": "pt"}
    with torch.no_grad():
        image, text, scale = model(pictures, tokenizer(names))
        inputs = processor(text=names, padding=True, truncation=True, **pictures_of)
        logits = CLIPModel.from_pretrained(hugging_face).eval()(**inputs).logits_per_image
        difference = logits.softmax(1) - (scale * image @ text.T).softmax(1)
    found["hugging_face"] = difference.abs().max().item()
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
