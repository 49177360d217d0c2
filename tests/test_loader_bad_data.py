"""Bad data at run time, case by case: what docs/data.md says the loader does with it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laclip import _native
from laclip.config import DataConfig
from laclip.dataset import REASONS, open_dataset
from laclip.evaluation.held_out import HeldOutSet
from laclip.loader import BROKEN, DataError, Loader
from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize
from laclip.tokenizer import load_tokenizer

SAMPLES, BATCH, VICTIM = 48, 16, 29
MARKER = "its data holds a marker that JPEG has not"


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number, size=(90, 70)):
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def write_tar(path, images, captions=None):
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(images):
            caption = (captions or {}).get(number, b"a picture of noise")
            for member, content in ((name, data), (f"{number:05}.txt", caption)):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def dataset(tmp_path):
    """A data set of small photographs; dataset(name, data, captions): with another image in one
    place, other captions."""

    def build(name=f"{VICTIM:05}.jpg", data=None, captions=None):
        images = [(f"{i:05}.jpg", encode(picture(i))) for i in range(SAMPLES)]
        if data is not None:
            images[VICTIM] = (name, data)
        folder = tmp_path / "dataset"
        folder.mkdir()
        write_tar(folder / "00000.tar", images, captions)
        index(folder)
        tokenize(folder)
        return folder

    return build


def batches(folder, log=None, **data):
    """An epoch of batches: samples and images."""
    loader = Loader(
        [open_dataset(folder)],
        DataConfig(max_bad_fraction=0.1, **data),
        load_tokenizer(),
        seed=1,
        global_batch_size=BATCH,
        image_size=32,
        context_length=16,
        device=torch.device("cpu"),
        bad_log=log,
    )
    return [next(loader) for _ in range(SAMPLES // BATCH)]


def record_of(folder):
    return open_dataset(folder).samples(0).records[VICTIM]


def overwrite(folder, change):
    """Change the victim's bytes in the tar after it was indexed; its length stays."""
    record = record_of(folder)
    with (folder / "00000.tar").open("r+b") as tar:
        tar.seek(int(record["offset"]))
        data = bytearray(tar.read(int(record["bytes"])))
        change(data)
        assert len(data) == record["bytes"]
        tar.seek(int(record["offset"]))
        tar.write(data)


def assert_victim_alone_is_replaced(expected, found):
    """Every other sample is what it was, to the last bit, and the substitute is another one."""
    for before, after in zip(expected, found):
        hit = before.samples == VICTIM
        assert (before.samples[~hit] == after.samples[~hit]).all()
        assert torch.equal(before.images[~hit], after.images[~hit])
        captions = [
            b.captions.token_ids.split(b.captions.lengths.tolist()) for b in (before, after)
        ]
        same = [torch.equal(a, b) for a, b in zip(*captions)]
        assert all(same[i] for i in np.flatnonzero(~hit))
        assert VICTIM not in after.samples
        assert len(set(after.samples)) == BATCH
        assert after.substitutes == hit.sum()
    assert sum(batch.substitutes for batch in found) == 1


def tail_of_zeros(data):
    data[len(data) * 2 // 3 :] = bytes(len(data) - len(data) * 2 // 3)


def all_zeros(data):
    data[:] = bytes(len(data))


def a_gif(data):
    gif = encode(picture(0, (5, 4)), "GIF")[: len(data)]
    data[: len(gif)] = gif


def another_size(data):
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = (7).to_bytes(2, "big")


def no_such_marker(data):
    data[len(data) // 2 : len(data) // 2 + 2] = b"\xff\x02"


def broken_huffman_table(data):
    at = data.index(b"\xff\xc4") + 5
    data[at : at + 16] = b"\xff" * 16


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tail_of_zeros, "the file is cut short"),
        (no_such_marker, MARKER),
        (all_zeros, "its header is not what the index says"),
        (a_gif, "its header is not what the index says"),
        (another_size, "its header is not what the index says"),
        (broken_huffman_table, "Failed to decode sample"),
    ],
)
def test_what_went_bad_since_indexing_costs_one_image(dataset, tmp_path, change, reason):
    folder = dataset()
    expected = batches(folder)
    overwrite(folder, change)
    log = tmp_path / "bad_samples.jsonl"
    assert_victim_alone_is_replaced(expected, batches(folder, log))
    (line,) = log.read_text().splitlines()
    record = json.loads(line)
    assert record == {
        "shard": str(folder / "00000.tar"),
        "key": f"{VICTIM:05}",
        "sample": VICTIM,
        "reason": reason,
    }


def test_a_full_disk_costs_the_line_about_a_bad_image_and_not_the_run(dataset, capsys):
    folder = dataset()
    overwrite(folder, all_zeros)
    found = batches(folder, Path("/dev/full"))
    assert sum(batch.substitutes for batch in found) == 1
    told = capsys.readouterr().out
    assert "No space left on device" in told and f'"key": "{VICTIM:05}"' in told


def test_what_a_jpegs_markers_show_to_be_broken_is_what_pillow_refuses():
    rng = np.random.default_rng(0)
    kinds = [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}]
    sound = [encode(picture(i, (300, 200)), quality=90, **kind) for i, kind in enumerate(kinds)]
    assert not any(_native.find_damage(np.frombuffer(data, np.uint8)) for data in sound)
    refused = flagged = 0
    for turn in range(400):
        data = bytearray(sound[turn % 3])
        at = rng.integers(700, len(data) - 40)
        data[at : at + 16] = rng.integers(0, 256, 16, dtype=np.uint8).tobytes()
        try:
            Image.open(io.BytesIO(data)).load()
            broken = False
        except OSError:
            broken = True
        refused += broken
        if _native.find_damage(np.frombuffer(data, np.uint8)) == BROKEN.index(MARKER):
            flagged += 1
            assert broken
    assert flagged > 0.8 * refused > 20  # the others' tables are broken


@pytest.mark.parametrize("change", [tail_of_zeros, no_such_marker, broken_huffman_table])
def test_indexing_with_decode_flags_what_training_would_not_use(dataset, change):
    folder = dataset()
    overwrite(folder, change)
    index(folder, decode=True)
    flags = open_dataset(folder).samples(0).records["flags"] & 1
    assert np.flatnonzero(flags).tolist() == [VICTIM]


def huge_png():
    """30,000 x 30,000 by its header; there are no pixels, so that decoding it would fail."""
    data = bytearray(encode(picture(0), "PNG"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image of zero bytes"),
        (encode(picture(1), "GIF"), "image kind is not JPEG, PNG or WebP"),
        (encode(picture(1))[:40], "broken image header"),
        (huge_png(), "image too large"),
    ],
)
def test_what_the_index_flags_is_never_read(dataset, tmp_path, data, reason):
    folder = dataset(data=data)
    assert REASONS[record_of(folder)["reason"]] == reason
    log = tmp_path / "bad_samples.jsonl"
    found = batches(folder, log)
    assert sum(batch.substitutes for batch in found) == 1
    assert not any(VICTIM in batch.samples for batch in found)
    assert not log.exists()  # known before the run


@pytest.mark.parametrize("caption", [b"", b" \n"])  # img2dataset writes the first for none
def test_an_image_with_a_blank_caption_is_not_used(dataset, caption):
    folder = dataset(captions={VICTIM: caption})
    found = batches(folder)
    assert sum(batch.substitutes for batch in found) == 1
    assert not any(VICTIM in batch.samples for batch in found)
    assert all((batch.captions.lengths > 2).all() for batch in found)
    opened = open_dataset(folder)
    held_out, victim = HeldOutSet(opened, load_tokenizer(), 77), opened.samples(0).key(VICTIM)
    names = held_out.images.names
    assert f"00000.tar/{victim}" not in names and len(names) == opened.num_samples - 1
    assert held_out.images.flagged == 1 and "" not in held_out.texts


def test_an_image_above_max_pixels_is_refused_before_decoding(dataset, tmp_path):
    folder = dataset(data=encode(picture(1, (200, 180)), "PNG")[:-40])  # decoding it would fail
    log = tmp_path / "bad_samples.jsonl"
    found = batches(folder, log, max_pixels=200 * 180 - 1)
    assert sum(batch.substitutes for batch in found) == 1 and not log.exists()
    batches(folder, log, max_pixels=200 * 180)
    assert "cut short" in log.read_text()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (f"{VICTIM:05}.png", encode(picture(1))),  # a JPEG under a wrong name
        (f"{VICTIM:05}.jpg", encode(picture(1), "WEBP")),
        (f"{VICTIM:05}.jpg", encode(picture(1).convert("CMYK"))),
        (f"{VICTIM:05}.png", encode(picture(1, (1, 1)), "PNG")),
        (f"{VICTIM:05}.jpg", encode(picture(1)) + bytes(700)),  # other data behind the end
    ],
)
def test_odd_but_whole_images_are_used(dataset, tmp_path, name, data):
    log = tmp_path / "bad_samples.jsonl"
    found = batches(dataset(name, data), log)
    assert sum(batch.substitutes for batch in found) == 0 and not log.exists()
    assert sum((batch.samples == VICTIM).sum() for batch in found) == 1


def test_a_shard_that_was_replaced_is_refused(dataset):
    folder = dataset()
    write_tar(folder / "00000.tar", [("00000.jpg", encode(picture(7)))])
    with pytest.raises(DataError, match=r"00000\.tar' has size in bytes .*Run: laclip index"):
        batches(folder)


def test_a_shard_replaced_by_one_of_the_same_size_is_noticed(dataset):
    folder = dataset()
    images = [(f"{i:05}.jpg", encode(picture(i + 100, (90, 71)))) for i in range(SAMPLES)]
    path = folder / "00000.tar"
    size = path.stat().st_size
    write_tar(path, images)
    with path.open("r+b") as tar:
        tar.truncate(size)
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: .* of the first"):
        batches(folder)


def test_a_shard_cut_short_while_it_is_read_ends_the_run(dataset):
    folder = dataset()
    loader = Loader(
        [open_dataset(folder)],
        DataConfig(prefetch=1),
        load_tokenizer(),
        seed=1,
        global_batch_size=BATCH,
        image_size=32,
        context_length=16,
        device=torch.device("cpu"),
    )
    next(loader)
    with (folder / "00000.tar").open("r+b") as tar:
        tar.truncate(2000)
    with pytest.raises(DataError, match=r"00000\.tar' ends inside sample \d+: it was cut short"):
        for _ in range(SAMPLES // BATCH):
            next(loader)


def test_a_shard_cut_short_while_a_substitute_is_read_ends_the_run_alike(dataset, monkeypatch):
    folder = dataset()
    overwrite(folder, all_zeros)
    mark_bad = Loader.mark_bad

    def cut_first(loader, samples):
        if samples:  # between the batch and its substitute
            (folder / "00000.tar").open("r+b").truncate(2000)
        mark_bad(loader, samples)

    monkeypatch.setattr(Loader, "mark_bad", cut_first)
    with pytest.raises(DataError, match=r"00000\.tar' ends inside sample \d+: it was cut short"):
        batches(folder)
