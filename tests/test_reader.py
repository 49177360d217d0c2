"""The C++ core of the loader: epoch order, batch reader, captions, crop windows."""

import contextlib
import gc
import hashlib
import itertools
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from laclip import _native
from laclip.dataset import open_dataset
from laclip.loader import shard_files
from laclip.tokenizer import load_tokenizer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
CAPTION = 3  # stream of csrc/epoch_order.hpp


def options(**values):
    result = _native.ReaderOptions()
    tokenizer = load_tokenizer()
    defaults = {
        "seed": 7,
        "global_batch_size": 128,
        "window_shards": 2,
        "context_length": 32,
        "sot_token": tokenizer.sot_token,
        "eot_token": tokenizer.eot_token,
    }
    for name, value in {**defaults, **values}.items():
        setattr(result, name, value)
    return result


def reader(folder=EMOJI / "train", **values):
    return _native.BatchReader(shard_files(open_dataset(folder)), options(**values))


def captions(batch):
    """The token ids of each caption, a list of samples for each variant."""
    each = np.split(batch.token_ids, batch.cu_seqlens[1:-1])
    return [each[i : i + batch.size] for i in range(0, len(each), batch.size)]


def digest(batch):
    """A hash a sample of all that the reader decides about it."""
    begins, texts = batch.begins, captions(batch)
    return [
        hashlib.sha256(
            b"|".join(
                [
                    batch.samples[i].tobytes(),
                    batch.drawn_variants[i].tobytes(),
                    batch.windows[i].tobytes(),
                    batch.mirrors[i].tobytes(),
                    *(variant[i].tobytes() for variant in texts),
                    batch.bytes[begins[i] : begins[i + 1]].tobytes(),
                ]
            )
        ).hexdigest()
        for i in range(batch.size)
    ]


@pytest.mark.parametrize("counts", [[1], [2], [5, 0, 3], [100] * 40, [1000, 1, 1, 500, 3]])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_an_epoch_holds_each_sample_once(counts, window):
    every = {(shard, index) for shard, count in enumerate(counts) for index in range(count)}
    for epoch in range(3):
        order = _native.EpochOrder(counts, 5, epoch, window)
        assert len(order) == len(every)
        assert {order[i] for i in range(len(order))} == every


def test_epochs_and_seeds_give_different_orders():
    counts = [50] * 8
    orders = [
        [_native.EpochOrder(counts, seed, epoch, 4)[i] for i in range(400)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = sum(x == y for x, y in zip(orders[a], orders[b]))
        assert same < 20  # one is expected by chance


def test_a_window_reads_from_its_own_shards_alone():
    order = _native.EpochOrder([100] * 40, 3, 0, 4)
    for window in range(10):
        assert len({order[400 * window + i][0] for i in range(400)}) == 4


def test_positions_inside_a_window_are_spread_evenly():
    # Where each tenth of a window's samples lands: 1000 a cell, standard deviation below 30.
    order = _native.EpochOrder([100_000], 0, 0, 1)
    cells = np.zeros((10, 10), int)
    for position in range(100_000):
        cells[position // 10_000, order[position][1] // 10_000] += 1
    assert np.abs(cells - 1000).max() < 150


def test_each_sample_is_read_exactly_once_by_all_ranks_together():
    total = len(reader())
    for world_size in (1, 2, 4):
        readers = [reader(rank=r, world_size=world_size) for r in range(world_size)]
        batches = -(-total // 128)
        seen = [s for k in range(batches) for r in readers for s in r.next().samples]
        assert sorted(seen[:total]) == list(range(total))


@pytest.mark.parametrize("policy", ["uniform", "multi"])
def test_ranks_threads_and_prefetch_leave_the_global_batches_as_they_are(policy):
    whole = reader(captions=policy)
    expected = [digest(whole.read(k)) for k in range(26)]
    for world_size, threads, prefetch in ((1, 1, 1), (1, 4, 7), (2, 2, 2), (4, 3, 5)):
        readers = [
            reader(
                captions=policy, rank=r, world_size=world_size, threads=threads, prefetch=prefetch
            )
            for r in range(world_size)
        ]
        for index in range(26):  # past the end of the first epoch
            parts = [r.next() for r in readers]
            assert {part.index for part in parts} == {index}
            assert [h for part in parts for h in digest(part)] == expected[index]


def test_any_batch_is_reached_directly():
    straight = reader()
    batches = [digest(straight.next()) for _ in range(40)]
    jumping = reader()
    for index in (33, 2, 39, 0):
        jumping.seek(index)
        assert digest(jumping.next()) == batches[index]


def bytes_read():
    """What this process has read from files since it began."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def test_a_reader_that_nobody_asks_reads_its_prefetch_and_no_more():
    sizes = [reader().read(k).bytes.size for k in range(4)]
    shards, ahead = shard_files(open_dataset(EMOJI / "train")), options(prefetch=3, threads=2)
    gc.collect()  # no reader of an earlier test reads on
    before = bytes_read()
    waiting = _native.BatchReader(shards, ahead)
    seen, deadline = [0], time.monotonic() + 300
    while seen[-1] < sum(sizes[:3]) or seen[-1] - seen[-2] > 1000:  # until it stands still
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
        seen.append(bytes_read() - before)
    assert seen[-1] < sum(sizes)
    assert waiting.next().index == 0


def test_far_batches_are_read_at_once():
    far = reader()
    far.seek(10**9)
    batch = far.next()
    assert batch.index == 10**9
    assert batch.epochs[0] == 10**9 * 128 // len(far)


def texts_of_train():
    """The texts of every sample by key, original first, from the files that users see."""
    import tarfile

    texts = {}
    for tar in sorted((EMOJI / "train").glob("*.tar")):
        with tarfile.open(tar) as file:
            for member in file:
                if member.name.endswith(".txt"):
                    key = member.name.removesuffix(".txt")
                    texts[key] = {"original": file.extractfile(member).read().decode()}
    for variant in open_dataset(EMOJI / "train").variants[1:]:
        for line in (EMOJI / "train" / f"{variant}.jsonl").read_text().splitlines():
            record = json.loads(line)
            texts[record["key"]][variant] = record["text"]
    return texts


def test_token_ids_are_those_of_the_drawn_caption():
    variants = open_dataset(EMOJI / "train").variants
    tokenizer = load_tokenizer()
    texts = texts_of_train()
    train = reader()
    fallbacks = 0
    for _ in range(5):
        batch = train.next()
        (found,) = captions(batch)
        for i, (sample, variant) in enumerate(zip(batch.samples, batch.drawn_variants)):
            own = texts[train.name(int(sample))[1]]
            text = own[variants[variant]]
            assert variant == 0 or len(text.split()) >= 2
            padded = tokenizer.encode_batch([text], context_length=32)[0].tolist()
            assert found[i].tolist() == padded[: padded.index(tokenizer.eot_token) + 1]
            word = _native.philox([int(sample), int(batch.epochs[i]), CAPTION, 0], 7, 0)[0]
            drawn = variants[(word * len(variants)) >> 64]
            if drawn != variants[variant]:
                fallbacks += 1
                assert variant == 0
                assert drawn not in own or len(own[drawn].split()) < 2
    assert fallbacks > 0  # or the fall-back was not tried


def test_policies_draw_what_they_say():
    variants = len(open_dataset(EMOJI / "train").variants)
    original = reader(captions="original")
    assert not any(original.next().drawn_variants.any() for _ in range(5))
    weights = [0.0] * variants
    weights[2] = 1.0
    weighted = reader(captions="weights", weights=weights)
    drawn = np.concatenate([weighted.next().drawn_variants for _ in range(5)])
    assert set(drawn) <= {0, 2} and (drawn == 2).mean() > 0.8
    batch = reader(captions="multi").read(3)
    single = reader(captions="original").read(3)
    assert len(captions(batch)) == batch.variants == variants
    assert (batch.samples == single.samples).all()
    for number, found in enumerate(captions(batch)):
        weights = [float(i == number) for i in range(variants)]
        only = captions(reader(captions="weights", weights=weights).read(3))[0]
        assert all(map(np.array_equal, found, only))


def test_long_captions_are_cut_and_end_in_end_of_text():
    tokenizer = load_tokenizer()
    whole, cut = (captions(reader(context_length=n).read(0))[0] for n in (32, 5))
    assert max(map(len, whole)) > 5 and max(map(len, cut)) == 5
    for full, found in zip(whole, cut):
        assert full[0] == tokenizer.sot_token and full[-1] == tokenizer.eot_token
        expected = [*full[: len(full) - 1][:4], tokenizer.eot_token]
        assert found.tolist() == expected


def test_padded_captions_are_the_packed_ones_and_padding():
    packed, padded = (reader(captions="multi", pad_captions=p, pad_token=7) for p in (False, True))
    for index in range(3):
        short, full = packed.read(index), padded.read(index)
        assert (np.diff(full.cu_seqlens) == 32).all() and short.cu_seqlens[0] == 0
        for a, b in zip(itertools.chain(*captions(short)), itertools.chain(*captions(full))):
            assert b[: len(a)].tolist() == a.tolist() and (b[len(a) :] == 7).all()


def test_a_tokenizer_without_start_token_begins_with_the_text():
    with_start, without = (captions(reader(sot_token=s).read(0))[0] for s in (49406, -1))
    assert all(a[1:].tolist() == b.tolist() for a, b in zip(with_start, without))


def test_flips_are_drawn_evenly_and_only_when_asked_for():
    assert not reader().read(0).mirrors.any()
    flipped = np.concatenate([reader(flip=True).read(k).mirrors for k in range(8)])
    assert 0.4 < flipped.mean() < 0.6


def test_a_bad_sample_yields_a_substitute_and_changes_nothing_else():
    clean = reader().read(5)
    bad = [int(clean.samples[i]) for i in (3, 70, 71)]
    one = reader()
    one.mark_bad(bad)
    batch = one.read(5)
    assert batch.substitutes == 3
    changed = [i for i in range(128) if batch.samples[i] != clean.samples[i]]
    assert changed == [3, 70, 71]
    assert len(set(batch.samples.tolist())) == 128
    before, after = digest(clean), digest(batch)
    assert [i for i in range(128) if before[i] != after[i]] == changed
    halves = []
    for rank in range(2):
        half = reader(rank=rank, world_size=2)
        half.mark_bad(bad)
        halves += digest(half.read(5))
    assert halves == after


def test_ranks_that_know_different_bad_samples_choose_different_substitutes():
    for index in range(10):
        chosen = []
        for rank in range(2):
            part = reader(rank=rank, world_size=2)
            part.mark_bad(part.plan(index).samples.tolist())
            chosen += part.plan(index).samples.tolist()
        assert len(set(chosen) | set(reader().plan(index).samples.tolist())) == 256


@pytest.mark.parametrize("size", [128, 768])
def test_a_substitute_does_not_depend_on_which_other_samples_are_known_to_be_bad(size):
    settings = {"window_shards": 1, "global_batch_size": size}  # of 1,024 samples a shard
    bad = set(range(0, 3070, 5))

    def choose(known, **share):
        part = reader(**settings, **share)
        while known:  # as the loader finds them
            part.mark_bad(sorted(known))
            samples = part.plan(0).samples.tolist()
            known = bad & set(samples)
        return samples

    expected = choose(bad)
    assert not bad & set(expected)
    parts = [choose({min(bad)}, rank=rank, world_size=4) for rank in range(4)]
    assert [sample for part in parts for sample in part] == expected


def test_a_batch_that_holds_whole_shards_still_finds_substitutes():
    wide = {"window_shards": 1, "global_batch_size": 1536}
    clean = reader(**wide).read(0)  # of 1,024 samples a shard
    (whole,) = [n for n in range(3) if np.isin(clean.samples // 1024, n).sum() >= 1022]
    inside = (clean.samples // 1024) == whole
    for bad in (clean.samples[inside][:5], clean.samples[inside]):  # some of a shard, all of it
        bad = list(map(int, bad))
        parts = [reader(**wide, rank=rank, world_size=2) for rank in range(2)]
        one = reader(**wide)
        for part in (one, *parts):
            part.mark_bad(bad)
        batch = one.read(0)
        assert batch.substitutes == len(bad) and not np.isin(batch.samples, bad).any()
        found = batch.samples[np.isin(clean.samples, bad)]
        assert ((found // 1024 == whole) == (len(bad) == 5)).all()
        kept = ~np.isin(clean.samples, bad)
        assert (batch.samples[kept] == clean.samples[kept]).all() and not batch.broken.any()
        assert digest(batch) == [h for part in parts for h in digest(part.read(0))]


def test_images_above_max_pixels_are_substituted():
    dataset = open_dataset(EMOJI / "train")
    sizes = np.concatenate(
        [
            dataset.samples(s).records["width"].astype(int) * dataset.samples(s).records["height"]
            for s in range(len(dataset.shards))
        ]
    )
    with pytest.raises(RuntimeError, match="every other sample of the shard is bad too"):
        reader(max_pixels=int(sizes.max()) - 1).read(0)
    assert reader(max_pixels=int(sizes.max())).read(0).substitutes == 0


def test_a_shard_cut_short_is_named(emoji_copy):
    tar = emoji_copy / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])
    with pytest.raises(RuntimeError, match=r"00001\.tar' has size in bytes .* Run: laclip index"):
        for _ in range(30):
            reader(emoji_copy).next()


def test_images_whose_header_changed_are_marked(emoji_copy):
    clean = reader(emoji_copy).read(0)
    assert not clean.broken.any()
    tar = emoji_copy / "00000.tar"
    tar.write_bytes(bytes(tar.stat().st_size))
    shard_size = open_dataset(emoji_copy).shards[0].samples
    batches = [reader(emoji_copy).read(index) for index in range(23)]
    for batch in batches:
        assert ((batch.samples < shard_size) == batch.broken.astype(bool)).all()


@pytest.mark.parametrize("suffix", ["samples", "captions"])
def test_damaged_sidecars_are_refused(emoji_copy, suffix):
    path = emoji_copy / f"00002.{suffix}"
    content = path.read_bytes()
    damages = {
        "size in bytes": content[:-2],
        "does not begin with": b"X" + content[1:],
        "format version": content[:8] + b"\x09" + content[9:],
        "its header alone": content[:20],
    }
    for message, damaged in damages.items():
        path.unlink()  # the reader before still maps it: its threads read ahead
        path.write_bytes(damaged)
        broken = reader(emoji_copy)
        with pytest.raises(RuntimeError, match=message) as error:
            for index in range(24):
                broken.read(index)
        assert str(path) in str(error.value)


@contextlib.contextmanager
def hanging(paths):
    """Files that hang when they are opened, until the end or for 120 seconds; then they are empty.

    Gives a list that is empty while they hang.
    """
    writers = []  # never closed: a thread may open one later

    def let_go():
        writers.extend(os.open(path, os.O_RDWR) for path in paths)

    for path in paths:
        path.unlink()
        os.mkfifo(path)  # opening it waits for a writer
    at_last = threading.Timer(120, let_go)
    at_last.start()
    try:
        yield writers
    finally:
        at_last.cancel()
        let_go()


class Interrupted(Exception):
    pass


def test_who_waits_for_a_file_system_that_hangs_can_be_interrupted(emoji_copy):
    asked = False

    def interrupt(*_):
        if asked:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    with hanging(list(emoji_copy.glob("*.captions"))):
        waiting = reader(emoji_copy)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        try:
            with pytest.raises(Interrupted):
                asked = True
                waiting.next()
        finally:
            asked = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    with pytest.raises(RuntimeError, match=r"captions' is 0 bytes long"):
        waiting.next()


def test_no_batch_waits_for_the_shards_of_the_next_window(emoji_copy):
    counts = [shard.samples for shard in open_dataset(emoji_copy).shards]
    order = _native.EpochOrder(counts, 7, 0, 1)
    first, second = order[0][0], order[counts[order[0][0]]][0]
    assert first != second
    with hanging([emoji_copy / f"{second:05}.captions"]) as let_go:
        reading = reader(emoji_copy, window_shards=1, threads=2)
        for _ in range(4):
            assert (reading.next().samples // 1024 == first).all()
        assert not let_go


def test_a_caption_entry_that_points_outside_is_refused(emoji_copy):
    path = emoji_copy / "00001.captions"
    content = bytearray(path.read_bytes())
    content[128 + 4 * 77 : 128 + 4 * 78] = (0x3FFFFFFF).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"00001\.captions' is damaged at sample \S+: .*verify"):
        for index in range(24):
            reader(emoji_copy, captions="multi").read(index)


def test_contradicting_options_are_refused():
    for values, message in (
        ({"world_size": 3}, "multiple of world_size"),
        ({"rank": 1}, "rank must be below world_size"),
        ({"captions": "weights", "weights": [1.0]}, "one weight for each"),
        ({"context_length": 2}, "context_length"),
    ):
        with pytest.raises(ValueError, match=message):
            reader(**values)
    with pytest.raises(ValueError, match="expected uniform, weights, original or multi"):
        reader(captions="all")
