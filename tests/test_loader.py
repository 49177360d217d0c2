"""The loader with DALI: images, bad data at run time, resume."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from laclip.config import DataConfig
from laclip.dataset import open_dataset
from laclip.images import NORMALIZATION, DecodeError, ImagePipeline
from laclip.loader import DataError, Loader
from laclip.tokenizer import load_tokenizer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
CPU = torch.device("cpu")
FILTERS = {"cubic": Image.Resampling.BICUBIC, "linear": Image.Resampling.BILINEAR}


def loader(folder=EMOJI / "train", data=None, **values):
    settings = {
        "seed": 3,
        "global_batch_size": 64,
        "image_size": 48,
        "context_length": 32,
        "device": CPU,
    }
    data = data or DataConfig()
    return Loader([open_dataset(folder)], data, load_tokenizer(), **{**settings, **values})


def levels(images, normalize="openai"):
    """Normalized images back in levels of 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in NORMALIZATION[normalize])
    return (images * std + mean) * 255


def photograph(width, height, seed):
    """A JPEG with smooth shading, edges and texture, and the picture that PIL decodes from it."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 24, width // 24, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    picture[height // 3 : height // 2, width // 4 : width // 2] //= 2
    picture += rng.integers(-6, 7, picture.shape)
    buffer = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return np.frombuffer(buffer.getvalue(), np.uint8), Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("interpolation", ["cubic", "linear"])
def test_training_images_are_those_of_pil(interpolation):
    encoded, pictures = zip(*(photograph(400 + 30 * i, 300 + 20 * i, i) for i in range(6)))
    windows = np.array([[7, 11, 350, 260], [0, 0, 100, 200], [50, 60, 224, 224]] * 2, np.int32)
    mirrors = np.array([0, 1] * 3, np.uint8)
    pipeline = ImagePipeline(
        batch_size=6, image_size=224, interpolation=interpolation, train=True, device=CPU
    )
    pipeline.feed(list(encoded), windows, mirrors)
    images = levels(pipeline.take())
    for image, picture, (x, y, w, h), mirror in zip(images, pictures, windows, mirrors):
        expected = picture.crop((x, y, x + w, y + h)).resize((224, 224), FILTERS[interpolation])
        if mirror:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        difference = np.abs(image.permute(1, 2, 0).numpy() - np.asarray(expected, np.float32))
        assert difference.mean() < 1


def test_evaluation_images_are_those_of_pil():
    sizes = ((500, 300), (320, 480), (224, 224), (333, 251), (225, 224), (229, 224), (100, 90))
    encoded, pictures = zip(*(photograph(w, h, w) for w, h in sizes))
    pipeline = ImagePipeline(batch_size=len(sizes), image_size=224, train=False, device=CPU)
    pipeline.feed(list(encoded))
    for image, picture in zip(levels(pipeline.take()), pictures):
        # torchvision's Resize and CenterCrop
        size = [int(224 * side / min(picture.size)) for side in picture.size]
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        x, y = (round((side - 224) / 2) for side in size)
        expected = np.asarray(resized.crop((x, y, x + 224, y + 224)), np.float32)
        difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 1


def test_normalization_can_be_imagenets():
    encoded, _ = photograph(300, 300, 0)
    images = []
    for normalize in NORMALIZATION:
        pipeline = ImagePipeline(
            batch_size=1, image_size=64, normalize=normalize, train=False, device=CPU
        )
        pipeline.feed([encoded])
        images.append(levels(pipeline.take(), normalize))
    assert (images[0] - images[1]).abs().max() < 1e-2


def test_undecodable_images_are_named_and_the_pipeline_goes_on():
    good = [photograph(200, 150, i)[0] for i in range(8)]
    gif = io.BytesIO()
    Image.new("RGB", (40, 40)).save(gif, "GIF")
    bad = list(good)
    bad[1] = np.frombuffer(gif.getvalue(), np.uint8)
    bad[4] = np.zeros(0, np.uint8)
    bad[6] = good[6][:300]
    windows = np.tile(np.array([[0, 0, 150, 150]], np.int32), (8, 1))
    mirrors = np.zeros(8, np.uint8)
    pipeline = ImagePipeline(batch_size=8, image_size=64, train=True, device=CPU)
    pipeline.feed(good, windows, mirrors)
    expected = pipeline.take()
    for _ in range(2):
        pipeline.feed(bad, windows, mirrors)
        pipeline.feed(good, windows, mirrors)
        with pytest.raises(DecodeError) as error:
            pipeline.take()
        assert sorted(error.value.reasons) == [1, 4, 6]
        assert all(error.value.reasons.values())
        pipeline.replace({i: good[i] for i in (1, 4, 6)}, windows, mirrors)
        assert torch.equal(pipeline.take(), expected)
        assert torch.equal(pipeline.take(), expected)


@pytest.mark.parametrize("train", [True, False])
def test_damaged_headers_in_batches_in_flight_never_crash(train):
    # A header that does not parse once ended the process: see ImagePipeline._build.
    good = [photograph(120, 100, i)[0] for i in range(32)]
    windows = np.tile(np.array([[5, 5, 80, 80]], np.int32), (32, 1))
    extra = (windows, np.zeros(32, np.uint8)) if train else ()
    pipeline = ImagePipeline(batch_size=32, image_size=32, train=train, device=CPU)
    pipeline.feed(good, *extra)
    expected = pipeline.take()
    rng = np.random.default_rng(0)
    failures = 0
    for _ in range(25):
        damaged = list(good)
        for position in rng.choice(32, 3, replace=False):
            image = good[position].copy()
            image[rng.integers(0, 600, 3)] = rng.integers(0, 256, 3)
            damaged[position] = image[: rng.integers(20, len(image))]
        pipeline.feed(good, *extra)
        pipeline.feed(damaged, *extra)
        assert torch.equal(pipeline.take(), expected)
        pipeline.feed(good, *extra)
        try:
            pipeline.take()
        except DecodeError as error:
            failures += 1
            assert len(error.reasons) <= 3
            pipeline.feed(good, *extra)  # leaves the failed batch out
            assert torch.equal(pipeline.take(), expected)
        assert torch.equal(pipeline.take(), expected)
    assert failures > 15


def test_a_loader_started_at_k_gives_what_one_from_the_start_gives():
    straight = loader()
    batches = [next(straight) for _ in range(6)]
    later = loader(start=4, data=DataConfig(prefetch=3, reader_threads=1, decode_threads=1))
    for expected in batches[4:]:
        batch = next(later)
        assert batch.index == expected.index
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.token_ids, expected.token_ids)


def test_two_ranks_give_the_halves_of_one():
    whole = loader()
    halves = [loader(rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):
        expected = next(whole)
        parts = [next(half) for half in halves]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.token_ids for part in parts]), expected.token_ids)


def damage(folder, samples, keep=0.0):
    """Overwrite images in place from a share of their bytes on; the tar's layout stays whole."""
    dataset = open_dataset(folder)
    keys = {}
    for number in samples:
        rest, shard = number, 0
        while rest >= dataset.shards[shard].samples:
            rest -= dataset.shards[shard].samples
            shard += 1
        record = dataset.samples(shard).records[rest]
        keys[number] = dataset.samples(shard).key(rest)
        with dataset.tar_path(shard).open("r+b") as file:
            kept = 2 + int(keep * int(record["bytes"]))
            file.seek(int(record["offset"]) + kept)
            file.write(bytes(int(record["bytes"]) - kept))
    return keys


@pytest.mark.parametrize("keep", [0.0, 0.35])  # nothing of the image, or its header and more
def test_a_bad_image_costs_one_image(emoji_copy, tmp_path, keep):
    clean = loader()
    expected = [next(clean) for _ in range(5)]
    victims = [int(expected[1].samples[10]), int(expected[3].samples[0])]
    keys = damage(emoji_copy, victims, keep)
    log = tmp_path / "bad_samples.jsonl"
    damaged = loader(emoji_copy, DataConfig(max_bad_fraction=0.05), bad_log=log)
    changed = []
    for index in range(5):
        batch = next(damaged)
        assert batch.index == index
        for i in range(64):
            same = batch.samples[i] == expected[index].samples[i]
            if not same:
                changed.append((index, i))
            assert same == torch.equal(batch.images[i], expected[index].images[i])
            assert not same or torch.equal(batch.token_ids[i], expected[index].token_ids[i])
    assert changed == [(1, 10), (3, 0)]
    assert sorted(damaged.bad_samples) == sorted(victims)
    assert damaged.take_new_bad_samples().keys() == set(victims)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["key"] for record in records] == [keys[victim] for victim in victims]
    assert all(record["reason"] and Path(record["shard"]).exists() for record in records)
    again = loader(emoji_copy, bad_samples=victims, start=1)
    assert int(next(again).samples[10]) not in victims


def test_too_many_bad_images_stop_the_run_with_a_list(emoji_copy):
    clean = loader()
    victims = next(clean).samples[:3].tolist()
    keys = damage(emoji_copy, victims)
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: 3 of the first 64") as error:
        next(loader(emoji_copy))
    assert all(key in str(error.value) for key in keys.values())


def test_unreadable_data_is_a_data_error(emoji_copy):
    for tar in emoji_copy.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data\.train: .*laclip index"):
        next(loader(emoji_copy))


def test_another_tokenizer_is_refused(emoji_copy):
    manifest = json.loads((emoji_copy / "dataset.json").read_text())
    manifest["tokenizer"] = "clip:0123456789abcdef"
    (emoji_copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"clip:0123456789abcdef, the model expects clip:.*Run: laclip tokenize"
    ):
        loader(emoji_copy)


def test_a_batch_that_does_not_divide_by_the_ranks_is_refused():
    with pytest.raises(ValueError, match="64 does not divide by the 3 ranks"):
        loader(rank=0, world_size=3)


def test_several_datasets_are_one_list(emoji_copy):
    both = Loader(
        [open_dataset(EMOJI / "train"), open_dataset(emoji_copy)],
        DataConfig(),
        load_tokenizer(),
        seed=0,
        global_batch_size=64,
        image_size=32,
        context_length=32,
        device=CPU,
    )
    one = open_dataset(EMOJI / "train").num_samples
    assert both.num_samples == 2 * one
    samples = np.concatenate([next(both).samples for _ in range(4)])
    assert (samples < one).any() and (samples >= one).any()
