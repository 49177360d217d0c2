"""The loader: its ranks, its restarts, bad data at run time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from laclip.config import DataConfig
from laclip.dataset import open_dataset
from laclip.loader import DataError, Loader
from laclip.tokenizer import load_tokenizer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
CPU = torch.device("cpu")


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
