"""Reading a dataset: what is in the sidecars, and what is refused."""

import contextlib
import io
import json
import shutil
import struct
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from laclip import _native
from laclip.dataset import CAPTION_MISSING, CAPTION_SHORT, open_dataset
from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize
from laclip.tokenizer import load_tokenizer

CAPTIONS = {
    "0.tar": {"a": "a red dog", "b": "dog", "c": "  "},
    "1.tar": {"d": "two cats on a mat", "é": "three"},
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "JPEG")
    for name, captions in CAPTIONS.items():
        with tarfile.open(folder / name, "w") as tar:
            for key, caption in captions.items():
                for extension, data in (("jpg", image.getvalue()), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    index(folder)
    rewrites = folder / "more.jsonl"
    lines = [{"key": "a", "text": "one dog that is red"}, {"key": "é", "text": "3"}]
    rewrites.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize(folder, {"more": rewrites})
    return folder


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "dataset")


def test_tokens_and_flags_are_those_of_the_texts(built):
    dataset = open_dataset(built)
    assert (dataset.variants, dataset.num_samples) == (("original", "more"), 5)
    tokenizer = load_tokenizer()
    assert dataset.tokenizer == tokenizer.fingerprint
    expected = {
        ("a", 0): ("a red dog", 0),
        ("a", 1): ("one dog that is red", 0),
        ("b", 0): ("dog", CAPTION_SHORT),
        ("b", 1): ("", CAPTION_MISSING),
        ("c", 0): ("", CAPTION_MISSING),
        ("c", 1): ("", CAPTION_MISSING),
        ("d", 0): ("two cats on a mat", 0),
        ("d", 1): ("", CAPTION_MISSING),
        ("é", 0): ("three", CAPTION_SHORT),
        ("é", 1): ("3", CAPTION_SHORT),
    }
    found = {}
    for shard in range(2):
        samples, captions = dataset.samples(shard), dataset.captions(shard)
        assert len(captions) == len(samples)
        for i in range(len(samples)):
            for variant in range(2):
                tokens = captions.tokens(i, variant).tolist()
                found[samples.key(i), variant] = tokens, captions.flags(i, variant)
    assert found == {k: (tokenizer.encode(text), flags) for k, (text, flags) in expected.items()}


def test_opening_reads_dataset_json_alone(folder):
    for path in folder.iterdir():
        if path.name != "dataset.json":
            path.unlink()
    dataset = open_dataset(folder / "dataset.json")
    assert dataset.num_samples == 5
    with pytest.raises(FileNotFoundError, match=r"0\.samples is missing\. Run: laclip index"):
        dataset.samples(0)
    with pytest.raises(FileNotFoundError, match=r"1\.captions is missing\. Run: laclip tokenize"):
        dataset.captions(1)


def test_the_fingerprint_sees_what_training_sees(folder):
    before = open_dataset(folder).fingerprint
    manifest = json.loads((folder / "dataset.json").read_text())
    changes = [
        lambda m: m["variants"].append("x"),
        lambda m: m.update(tokenizer="clip:0"),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"][0].update(samples=4),
        lambda m: m["shards"][0].update(bad=1),
        lambda m: m["shards"][1].update(samples_checksum="0" * 16),
        lambda m: m["shards"][1].update(captions_checksum="0" * 16),
    ]
    seen = {before}
    for change in changes:
        changed = json.loads(json.dumps(manifest))
        change(changed)
        (folder / "dataset.json").write_text(json.dumps(changed))
        seen.add(open_dataset(folder).fingerprint)
    assert len(seen) == len(changes) + 1
    manifest["libraries"] = {"numpy": "0"}
    (folder / "dataset.json").write_text(json.dumps(manifest))
    assert open_dataset(folder).fingerprint == before


def patch(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


DAMAGE = {
    "empty": (lambda p: p.write_bytes(b""), "shorter than its header"),
    "short": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "its header announces"),
    "long": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "its header announces"),
    "magic": (lambda p: patch(p, 0, b"NOTLACLI"), "expected b'LACLIP"),
    "version": (lambda p: patch(p, 8, struct.pack("<I", 2)), "version 2"),
    "count": (lambda p: patch(p, 16, struct.pack("<Q", 1 << 62)), "its header announces"),
    "checksum": (lambda p: patch(p, -8 + (64 if p.suffix == ".samples" else 128), b"\1" * 8),
                 "dataset.json records"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".samples", ".captions"])
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_sidecar_is_refused(case, suffix, folder):
    damage, message = DAMAGE[case]
    damage(folder / f"0{suffix}")
    dataset = open_dataset(folder)
    read = dataset.samples if suffix == ".samples" else dataset.captions
    with pytest.raises(ValueError, match=message) as error:
        read(0)
    assert f"0{suffix}" in str(error.value) and "Run: laclip" in str(error.value)
    assert len(read(1)) == 2


def test_captions_of_other_samples_or_another_tokenizer_are_refused(folder):
    path = folder / "0.captions"
    manifest = json.loads((folder / "dataset.json").read_text())

    def reseal():
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        data[120:128] = 0
        patch(path, 120, struct.pack("<Q", _native.xxh64(data)))
        manifest["shards"][0]["captions_checksum"] = f"{_native.xxh64(data):016x}"
        (folder / "dataset.json").write_text(json.dumps(manifest))

    whole = path.read_bytes()
    patch(path, 40, b"\0" * 8)
    reseal()
    with pytest.raises(ValueError, match="made for samples 0000000000000000"):
        open_dataset(folder).captions(0)
    path.write_bytes(whole)
    patch(path, 48, b"sentencepiece:ff\0\0\0\0\0\0\0")
    reseal()
    with pytest.raises(ValueError, match=r"by tokenizer sentencepiece:ff.*Run: laclip tokenize"):
        open_dataset(folder).captions(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "format None, expected 'laclip-dataset'"),
        ('{"format": "other"}', "format 'other'"),
        ('{"format": "laclip-dataset", "version": 9}', "version 9, this laclip reads 1"),
        ('{"format": "laclip-dataset", "version": 1}', "'variants' is missing"),
    ],
)
def test_a_broken_dataset_json_is_refused(content, message, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_a_missing_dataset_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="Run: laclip index"):
        open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")


def test_captions_before_tokenize_say_what_to_run(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest.update(variants=[], tokenizer=None)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"not tokenized yet\. Run: laclip tokenize"):
        open_dataset(folder).captions(0)


@pytest.mark.parametrize(("sample", "variant"), [(-1, 0), (3, 0), (0, -1), (0, 2)])
def test_a_caption_out_of_range_is_an_error(sample, variant, built):
    with pytest.raises(IndexError):
        open_dataset(built).captions(0).tokens(sample, variant)


@settings(max_examples=150)
@given(st.data())
def test_damage_behind_the_header_never_reads_outside_the_file(built, tmp_path_factory, data):
    """Only `laclip verify` sees such damage; until then it must do no harm."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("dataset.json", "0.samples", "0.captions"):
        content = bytearray((built / name).read_bytes())
        if name != "dataset.json":
            first = 64 if name == "0.samples" else 128
            for _ in range(data.draw(st.integers(0, 6))):
                content[data.draw(st.integers(first, len(content) - 1))] ^= data.draw(
                    st.integers(1, 255)
                )
        (folder / name).write_bytes(content)
    dataset = open_dataset(folder)
    samples, captions = dataset.samples(0), dataset.captions(0)
    total = len(captions.all_tokens)
    for i in range(len(samples)):
        with contextlib.suppress(UnicodeDecodeError):
            assert len(samples.key(i).encode()) <= int(samples.header["keys_bytes"])
        for variant in range(2):
            assert len(captions.tokens(i, variant)) <= total
