"""The embedded emoji data: what its splits promise, read from the committed files."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from laclip import _native
from laclip.dataset import BAD, open_dataset
from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
SPLITS = ("train", "unseen_vendor", "unseen_concept", "unseen_phrasing")
EVALUATION = SPLITS[1:]


def read(split):
    """[(key, JPEG, caption)] of a split."""
    dataset = open_dataset(EMOJI / split)
    items = []
    for shard in range(len(dataset.shards)):
        tar = dataset.tar_path(shard)
        captions = dict(_native.read_tar_texts(str(tar), "txt", 1 << 16))
        data = tar.read_bytes()
        table = dataset.samples(shard)
        for i, record in enumerate(table.records):
            begin = int(record["offset"])
            image = data[begin : begin + int(record["bytes"])]
            items.append((table.key(i), image, captions[table.key(i)].decode()))
    return items


@pytest.fixture(scope="module")
def items():
    return {split: read(split) for split in SPLITS}


def rewrites():
    return [
        json.loads(line)
        for path in sorted((EMOJI / "train").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def plain(text):
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def code_base(key):
    """The code points of a key without tones, genders, directions and joiners."""
    parts = key.split("-")[1:]
    persons = {"1f468": "p", "1f469": "p", "1f9d1": "p"}
    ignored = {"200d", "2640", "2642", "fe0f", "27a1", *(f"1f3f{d}" for d in "bcdef")}
    kept = [persons.get(part, part) for part in parts if part not in ignored]
    return tuple(kept or parts)


def label_base(caption):
    label = re.sub(r": .*(skin tone|facing right)$", "", caption.lower())
    return plain(re.sub(r"\b(man|woman|person|men|women|people|boy|girl)\b", "", label))


@pytest.mark.parametrize("split", SPLITS)
def test_sidecars_are_what_index_and_tokenize_make_of_the_tars(split, tmp_path):
    for pattern in ("*.tar", "*.jsonl"):
        for path in (EMOJI / split).glob(pattern):
            shutil.copy(path, tmp_path)
    index(tmp_path)
    tokenize(tmp_path, {path.stem: path for path in sorted(tmp_path.glob("*.jsonl"))})
    for path in (EMOJI / split).iterdir():
        if path.suffix in (".samples", ".captions"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    committed = json.loads((EMOJI / split / "dataset.json").read_text())
    rebuilt = json.loads((tmp_path / "dataset.json").read_text())
    assert committed.pop("libraries").keys() == rebuilt.pop("libraries").keys()
    assert rebuilt == committed


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_decodes_to_its_recorded_size(split, items):
    dataset = open_dataset(EMOJI / split)
    for shard in range(len(dataset.shards)):
        records = dataset.samples(shard).records
        assert not (records["flags"] & BAD).any()
        assert (records["width"] == 64).all() and (records["height"] == 64).all()
    for _, image, _ in items[split]:
        assert Image.open(io.BytesIO(image)).convert("RGB").size == (64, 64)


def test_sizes_of_the_splits(items):
    assert len(items["train"]) >= 3000
    assert all(len(items[split]) >= 300 for split in EVALUATION)
    assert sum(p.stat().st_size for p in EMOJI.rglob("*") if p.is_file()) <= 20e6
    tones = sum("skin tone" in caption for _, _, caption in items["train"])
    assert tones < 0.2 * len(items["train"])


@pytest.mark.parametrize("split", EVALUATION)
def test_no_two_items_of_an_evaluation_set_share_image_or_caption(split, items):
    keys, images, captions = zip(*items[split], strict=True)
    for column in (keys, images, [plain(caption) for caption in captions]):
        assert len(set(column)) == len(column)


def test_the_unseen_vendor_is_unseen_and_its_concepts_are_not(items):
    known = {key.split("-", 1)[1] for key, _, _ in items["train"]}
    assert all(not key.startswith("fxemoji-") for key, _, _ in items["train"])
    for key, _, _ in items["unseen_vendor"]:
        vendor, code = key.split("-", 1)
        assert vendor == "fxemoji" and code in known
    captions = {caption for _, _, caption in items["train"]}
    assert {caption for _, _, caption in items["unseen_vendor"]} <= captions


def test_no_variant_of_an_unseen_concept_is_in_training(items):
    trained = [*items["train"], *items["unseen_vendor"], *items["unseen_phrasing"]]
    codes = {code_base(key) for key, _, _ in trained}
    labels = {label_base(caption) for _, _, caption in items["train"]}
    texts = {plain(caption) for _, _, caption in items["train"]}
    texts |= {plain(rewrite["text"]) for rewrite in rewrites()}
    images = {image for _, image, _ in trained}
    for key, image, caption in items["unseen_concept"]:
        assert code_base(key) not in codes, key
        assert not label_base(caption) or label_base(caption) not in labels, caption
        assert plain(caption) not in texts
        assert image not in images, key


def test_no_training_text_has_an_unseen_phrasing(items):
    texts = {plain(caption) for _, _, caption in items["train"]}
    texts |= {plain(rewrite["text"]) for rewrite in rewrites()}
    texts |= {text.removesuffix(" emoji") for text in texts}
    squeezed = {text.replace(" ", "") for text in texts}
    images = {key: image for key, image, _ in items["train"]}
    for key, image, caption in items["unseen_phrasing"]:
        assert plain(caption).replace(" ", "") not in squeezed, caption
        assert images[key] == image


def test_rewrites_belong_to_training_images_and_differ_from_the_caption(items):
    captions = {key: caption for key, _, caption in items["train"]}
    for rewrite in rewrites():
        assert plain(rewrite["text"]) != plain(captions[rewrite["key"]])
        assert len(rewrite["text"].split()) >= 2
