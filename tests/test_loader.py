"""The loader: its ranks, its restarts, bad data at run time."""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from laclip.config import DataConfig
from laclip.dataset import open_dataset
from laclip.images import ImagePipeline
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


EPOCH = 26  # batches of 128: past the end of the 3,070 samples


def texts(batch):
    """The token ids of each caption of a batch."""
    return batch.captions.token_ids.split(batch.captions.lengths.tolist())


def hashes(batch, keys):
    """A hash of all that training sees of a sample, for each sample of a batch."""
    captions = texts(batch)
    return [
        hashlib.sha256(
            b"|".join(
                [
                    keys[batch.samples[i]].encode(),
                    batch.drawn_variants[i].tobytes(),
                    captions[i].numpy().tobytes(),
                    batch.images[i].numpy().tobytes(),  # and so the window and the flip
                ]
            )
        ).hexdigest()
        for i in range(len(batch.samples))
    ]


def epoch_hashes(world_size, restarts, **data):
    """The hashes of an epoch's global batches; at each restart all ranks begin anew."""
    dataset = open_dataset(EMOJI / "train")
    tables = map(dataset.samples, range(len(dataset.shards)))
    keys = list(itertools.chain.from_iterable(table.keys() for table in tables))
    found = []
    for begin, end in itertools.pairwise([0, *restarts, EPOCH]):
        ranks = [
            loader(
                data=DataConfig(flip=True, window_shards=2, **data),
                global_batch_size=128,
                image_size=24,
                rank=rank,
                world_size=world_size,
                start=begin,
            )
            for rank in range(world_size)
        ]
        for index in range(begin, end):
            parts = [next(rank) for rank in ranks]
            assert {part.index for part in parts} == {index}
            found.append([h for part in parts for h in hashes(part, keys)])
    return found


def test_ranks_restarts_threads_and_prefetch_change_no_hash_of_an_epoch():
    expected = epoch_hashes(1, [])
    assert len({h for batch in expected for h in batch}) > 3070  # the second epoch draws anew
    for world_size, restarts, data in (
        (1, [1, 9], {"prefetch": 1, "reader_threads": 1, "decode_threads": 1}),
        (2, [13], {"prefetch": 3, "reader_threads": 2, "decode_threads": 1}),
        (4, [], {"prefetch": 2, "reader_threads": 3, "decode_threads": 2}),
    ):
        assert epoch_hashes(world_size, restarts, **data) == expected


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


def test_a_batch_made_ready_ahead_is_the_next_one_and_its_error_waits_for_next(emoji_copy):
    plain, ahead = loader(), loader()
    for index in range(3):
        ahead.prepare()
        ahead.prepare()
        expected, found = next(plain), next(ahead)
        assert found.index == expected.index == index
        assert torch.equal(found.images, expected.images)
    (emoji_copy / "00001.captions").unlink()
    broken = loader(emoji_copy)
    with pytest.raises(DataError, match="cannot be opened"):
        for _ in range(48):
            try:
                broken.prepare()
            except DataError as error:
                raise AssertionError("raised where nobody had asked for the batch") from error
            next(broken)


class Interrupted(Exception):
    pass


def test_a_loader_that_was_interrupted_goes_on_where_it_was(monkeypatch):
    clean, stopped = (loader(global_batch_size=128) for _ in range(2))  # two parts a batch
    fetch, fetched = ImagePipeline._fetch, []

    def interrupt(pipeline, *part):
        fetched.append(part)
        if len(fetched) in (2, 7, 8):  # as Ctrl-C does, when DALI has given the part away
            pipeline._pipeline.outputs()
            raise Interrupted
        fetch(pipeline, *part)

    for index in range(6):
        expected = next(clean)
        with monkeypatch.context() as patch:
            patch.setattr(ImagePipeline, "_fetch", interrupt)
            while True:
                with contextlib.suppress(Interrupted):
                    found = next(stopped)
                    break
        assert found.index == expected.index == index
        assert (found.samples == expected.samples).all()
        assert torch.equal(found.images, expected.images)
    assert len(fetched) > 14


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
            assert not same or torch.equal(texts(batch)[i], texts(expected[index])[i])
    assert changed == [(1, 10), (3, 0)]
    assert sorted(damaged.bad_samples) == sorted(victims)
    assert damaged.take_new_bad_samples().keys() == set(victims)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["key"] for record in records] == [keys[victim] for victim in victims]
    assert all(record["reason"] and Path(record["shard"]).exists() for record in records)
    again = loader(emoji_copy, bad_samples=victims, start=1)
    assert int(next(again).samples[10]) not in victims


def test_a_loader_that_is_let_go_in_an_epoch_leaves_no_thread():
    threads = Path("/proc/self/task")
    before = {thread.name for thread in threads.iterdir()}
    loading = loader(data=DataConfig(prefetch=3, reader_threads=3))
    next(loading)
    assert len({thread.name for thread in threads.iterdir()} - before) >= 3
    del loading
    deadline = time.monotonic() + 300  # a thread that was joined may be listed a moment longer
    while not {thread.name for thread in threads.iterdir()} <= before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_too_many_bad_images_stop_the_run_with_a_list(emoji_copy):
    clean = loader()
    victims = next(clean).samples[:3].tolist()
    keys = damage(emoji_copy, victims)
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: 3 of the first 64") as error:
        next(loader(emoji_copy))
    assert all(key in str(error.value) for key in keys.values())


def test_two_bad_images_in_the_first_batch_may_be_chance(emoji_copy):
    victims = next(loader()).samples[:2].tolist()
    damage(emoji_copy, victims)
    unlucky = loader(emoji_copy)
    assert next(unlucky).substitutes == 2 and sorted(unlucky.bad_samples) == sorted(victims)


def test_bad_images_are_held_against_the_samples_up_to_their_batch(emoji_copy):
    """Batches are read ahead: the fourth is when the first has not been taken."""
    ahead = DataConfig(max_bad_fraction=0.01, prefetch=4)
    clean = loader(data=ahead)
    victims = [sample for count in (5, 1, 1, 1) for sample in next(clean).samples[:count].tolist()]
    damage(emoji_copy, victims)
    damaged = loader(emoji_copy, ahead)
    for _ in range(4):
        next(damaged)
    assert sorted(damaged.bad_samples) == sorted(victims)


def test_where_no_bad_image_is_allowed_the_first_one_stops_the_run(emoji_copy):
    damage(emoji_copy, next(loader()).samples[:1].tolist())
    with pytest.raises(DataError, match=r"data\.max_bad_fraction: 1 of the first 64"):
        next(loader(emoji_copy, DataConfig(max_bad_fraction=0.0)))


def test_unreadable_data_is_a_data_error(emoji_copy):
    for tar in emoji_copy.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"data\.train: .*laclip index"):
        next(loader(emoji_copy))


def test_a_file_that_is_not_there_is_named(emoji_copy):
    (emoji_copy / "00001.captions").unlink()
    with pytest.raises(DataError, match=r"00001\.captions' cannot be opened: .*laclip tokenize"):
        for batch in itertools.islice(loader(emoji_copy), 48):
            assert batch.index < 47


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


def test_weights_ask_for_variants_in_one_order(emoji_copy):
    manifest = json.loads((emoji_copy / "dataset.json").read_text())
    weights = DataConfig(captions="weights", weights=(1.0,) * len(manifest["variants"]))
    opened = [open_dataset(EMOJI / "train"), open_dataset(emoji_copy)]
    rest = {"seed": 0, "global_batch_size": 8, "image_size": 16, "context_length": 32}
    next(Loader(opened, weights, load_tokenizer(), device=CPU, **rest))
    manifest["variants"][1:] = manifest["variants"][:0:-1]
    (emoji_copy / "dataset.json").write_text(json.dumps(manifest))
    opened[1] = open_dataset(emoji_copy)
    with pytest.raises(ValueError, match=r"data\.weights: one a variant, but .* in one order"):
        Loader(opened, weights, load_tokenizer(), device=CPU, **rest)


def test_several_datasets_are_one_list(emoji_copy):
    folders = [EMOJI / "train", emoji_copy]
    one = open_dataset(folders[0]).num_samples
    both = Loader(
        [open_dataset(folder) for folder in folders],
        DataConfig(),
        load_tokenizer(),
        seed=0,
        global_batch_size=307,
        image_size=16,
        context_length=32,
        device=CPU,
    )
    assert both.num_samples == 2 * one
    batches = [next(both) for _ in range(2 * one // 307)]
    samples = np.concatenate([batch.samples for batch in batches])
    assert sorted(samples) == list(range(2 * one))  # an epoch holds each of both once
    mixed = [batch for batch in batches if (batch.samples < one).any()]
    assert any((batch.samples >= one).any() for batch in mixed)
    # Place one + i in the list is sample i of the second: the same picture and captions here.
    seen = {}
    for batch in batches:
        for sample, variant, ids in zip(batch.samples, batch.drawn_variants, texts(batch)):
            seen.setdefault((int(sample) % one, int(variant)), []).append(ids.tolist())
    twice = [found for found in seen.values() if len(found) == 2]
    assert len(twice) > 300 and all(a == b for a, b in twice)


def test_a_folder_listed_twice_is_drawn_twice_an_epoch_each_time_anew(emoji_copy, tmp_path):
    victim = int(next(loader(emoji_copy)).samples[0])
    (key,) = damage(emoji_copy, [victim]).values()
    one = open_dataset(emoji_copy)

    def twice(**values):
        rest = {"seed": 0, "global_batch_size": 307, "image_size": 16, "context_length": 32}
        data = DataConfig(flip=True)
        return Loader([one, one], data, load_tokenizer(), device=CPU, **rest, **values)

    log = tmp_path / "bad_samples.jsonl"
    reading, drawn = twice(bad_log=log), {}
    batches = [next(reading) for _ in range(2 * one.num_samples // 307)]
    copies = [victim, victim + one.num_samples]
    assert sorted(reading.bad_samples) == copies
    assert [json.loads(line)["key"] for line in log.read_text().splitlines()] == [key, key]
    assert sum(batch.substitutes for batch in batches) == 2
    for batch in batches:
        plan = reading._reader.plan(batch.index)
        assert (plan.samples == batch.samples).all() and not set(copies) & set(plan.samples)
        for values in zip(plan.samples, plan.drawn_variants, plan.windows.tolist(), plan.mirrors):
            drawn.setdefault(int(values[0]) % one.num_samples, []).append(values[1:])
    pairs = [places for places in drawn.values() if len(places) == 2]
    assert len(pairs) > one.num_samples - 5
    for what in range(3):  # caption, window, flip: most captions have four rewrites or fewer
        equal = np.mean([first[what] == second[what] for first, second in pairs])
        assert equal < (0.5, 0.01, 0.6)[what]
    going_on = twice(start=9, bad_samples=copies)
    for expected in batches[9:11]:
        found = next(going_on)
        assert (found.samples == expected.samples).all()
        assert torch.equal(found.images, expected.images)


def test_a_loader_that_a_process_inherits_says_so_and_does_not_wait():
    reading = loader()
    told, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            next(reading)
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    with open(told) as pipe:
        assert f"made in process {os.getpid()}, used in process {child}" in pipe.read()
    os.waitpid(child, 0)
    assert next(reading).index == 0
