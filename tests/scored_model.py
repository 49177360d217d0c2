"""What the tests of laclip evaluate share: a small trained model, the emoji as class folders."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from laclip.cli import main
from laclip.config import load_config
from laclip.evaluation.prompts import FOLDER
from laclip.images import ImagePipeline
from laclip.kernels import clip_loss
from laclip.model import build_model
from laclip.tokenizer import load_tokenizer
from laclip.typed_toml import dump

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
SETTINGS = [
    *("model.embed_dim=40", "model.vision.width=32", "model.vision.depth=1"),
    *("model.vision.heads=2", "model.vision.image_size=48", "model.vision.patch_size=16"),
    *("model.text.width=32", "model.text.depth=1", "model.text.heads=2"),
    *("model.text.context_length=16", "evaluation.batch_size=32"),
]


def pairs(classes):
    """The first words, by the alphabet, that two vendors draw: {caption: {key: JPEG}}."""
    found = {}
    for path in sorted((EMOJI / "train").glob("*.tar")):
        members = read_tar(path)
        for name, content in members.items():
            key, _, kind = name.rpartition(".")
            if kind == "txt":
                found.setdefault(content.decode(), {})[key] = members[f"{key}.jpg"]
    both = [name for name in sorted(found) if len(found[name]) == 2 and name.islower()]
    both = [name for name in both if name.replace(" ", "").isalpha()]
    return {caption: found[caption] for caption in both[:classes]}


def write_folders(folder, drawings):
    for caption, images in drawings.items():
        (folder / caption.replace(" ", "_")).mkdir(parents=True)
        for key, image in images.items():
            (folder / caption.replace(" ", "_") / f"{key}.jpg").write_bytes(image)
    return folder


def read_tar(path):
    """The files of a tar as {name: bytes}."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}


def write_tar(path, members):
    """A tar of {name: bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_run(folder, *overrides, drawings=None, steps=120):
    """A run's folder with a small model, trained on drawings if there are any."""
    config = load_config(None, [*SETTINGS, *overrides])
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump(config))
    torch.manual_seed(0)
    model = build_model(config.model, 49408, 49407)
    if drawings:
        encoded = [np.frombuffer(i, np.uint8) for d in drawings.values() for i in d.values()]
        size = config.model.vision.image_size
        pipeline = ImagePipeline(
            batch_size=len(encoded), image_size=size, train=False, device=torch.device("cpu")
        )
        pipeline.feed(encoded)
        images = pipeline.take().unflatten(0, (-1, 2))
        length = config.model.text.context_length
        tokenizer = load_tokenizer()
        prompts = ["{}", *(FOLDER / "templates_simple.txt").read_text().splitlines()]
        prompts = [[prompt.replace("{}", name) for name in drawings] for prompt in prompts]
        texts = [torch.from_numpy(tokenizer.encode_batch(names, length)) for names in prompts]
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        for step in range(steps):
            loss = clip_loss(*model(images[:, step % 2], texts[step % 8]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    return folder


def evaluate(folder, *words):
    """The scores that `laclip evaluate` writes."""
    out = folder.parent / "scores.json"
    arguments = ["evaluate", str(folder), *map(str, words), "--out", str(out)]
    assert main(arguments) == 0
    return json.loads(out.read_text())


def refuse(capsys, folder, *words):
    """The message with which `laclip evaluate` ends."""
    assert main(["evaluate", str(folder), *map(str, words)]) == 2
    return capsys.readouterr().err
