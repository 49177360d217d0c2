"""The order of an epoch and all that is drawn for a sample, against plain Python.

The functions here are csrc/philox.hpp, epoch_order.cpp and draws.cpp once more, without their
tricks: whole lists for lookups, Python's numbers for 64-bit words.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from laclip import _native
from laclip.dataset import open_dataset
from laclip.loader import shard_files

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
SHARDS, WINDOWS, CAPTION, CROP = 1, 2, 3, 4  # streams
MISSING, SHORT = 1 << 31, 1 << 30  # flags of a caption's entry
WORD = 2**64


def philox(counter, key0, key1):
    """Philox4x64-10."""
    a, b, c, d = counter
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b = (right // WORD) ^ b ^ key0, right % WORD
        c, d = (left // WORD) ^ d ^ key1, left % WORD
        key0 = (key0 + 0x9E3779B97F4A7C15) % WORD
        key1 = (key1 + 0xBB67AE8584CAA73B) % WORD
    return [a, b, c, d]


def mix(word):
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD % WORD
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53 % WORD
    return word ^ (word >> 33)


def shuffled(size, key0, key1):
    """The numbers below size, in an order that the key decides: a Feistel network on the next
    power of two, from which the numbers beyond size are walked on."""
    bits = max(2, (size - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2
    keys = philox([0, 0, 0, 0], key0, key1) + philox([1, 0, 0, 0], key0, key1)

    def network(number):
        high, low = divmod(number, 2**low_bits)
        for even, odd in ((0, 1), (2, 3), (4, 5)):
            high = (high ^ mix(low ^ keys[even])) % 2**high_bits
            low = (low ^ mix(high ^ keys[odd])) % 2**low_bits
        return high * 2**low_bits + low

    order = []
    for number in range(size):
        number = network(number)
        while number >= size:
            number = network(number)
        order.append(number)
    return order


def epoch_order(counts, seed, epoch, window_shards):
    """(shard, index) of every sample, in the order of the epoch."""
    shards = list(range(len(counts)))
    for i in range(len(shards), 1, -1):  # Fisher and Yates
        j = philox([i, epoch, SHARDS, 0], seed, 0)[0] * i // WORD
        shards[i - 1], shards[j] = shards[j], shards[i - 1]
    order = []
    for window in range(-(-len(shards) // window_shards)):
        inside = shards[window * window_shards : (window + 1) * window_shards]
        places = [(shard, index) for shard in inside for index in range(counts[shard])]
        key = philox([window, epoch, WINDOWS, 0], seed, 0)
        order += [places[i] for i in shuffled(len(places), key[0], key[1])]
    return order


@pytest.mark.parametrize(
    ("counts", "windows"),
    [
        ([1], [1, 2]),
        ([4097], [1]),
        ([1, 1, 1, 1, 1], [1, 2, 5]),
        ([7, 0, 300, 1, 64, 2, 0, 129, 33], [1, 2, 4, 9, 100]),
        ([1 + i * 7 % 5 for i in range(1000)], [1, 16, 999]),
    ],
)
def test_an_epochs_order_equals_the_slow_twin(counts, windows):
    for window, (seed, epoch) in itertools.product(windows, [(0, 0), (2**64 - 1, 3)]):
        order = _native.EpochOrder(counts, seed, epoch, window)
        expected = epoch_order(counts, seed, epoch, window)
        assert [order[i] for i in range(len(order))] == expected


def rounded(number):
    return math.floor(number + 0.5)


def draw_window(width, height, sample, epoch, seed, scale, ratio):
    """torchvision's RandomResizedCrop.get_params."""
    for attempt in range(10):
        words = philox([sample, epoch, CROP, attempt], seed, 0)
        share, place = ((word >> 11) / 2**53 for word in words[:2])
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        log_low, log_high = map(math.log, ratio)
        aspect = math.exp(log_low + place * (log_high - log_low))
        w, h = rounded(math.sqrt(area * aspect)), rounded(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [words[2] * (width - w + 1) // WORD, words[3] * (height - h + 1) // WORD, w, h]
    w, h = width, height
    if width / height < ratio[0]:
        h = rounded(w / ratio[0])
    elif width / height > ratio[1]:
        w = rounded(h * ratio[1])
    return [(width - w) // 2, (height - h) // 2, w, h]


def draw_variant(policy, weights, variants, entries, sample, epoch, seed):
    """The drawn caption, or the original where that one is missing or shorter than two words."""
    word = philox([sample, epoch, CAPTION, 0], seed, 0)[0]
    if policy == "uniform":
        variant = word * variants // WORD
    else:
        shares = np.cumsum(weights) / sum(weights)
        variant = int(np.searchsorted(shares, (word >> 11) / 2**53, side="right"))
    return 0 if entries[variant] & (MISSING | SHORT) else variant


@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("policy", ["uniform", "weights"])
def test_whole_batches_equal_the_slow_twin(policy, scale):
    dataset, seed, batch_size, ratio = open_dataset(EMOJI / "train"), 7, 256, (0.75, 4 / 3)
    counts, variants = [shard.samples for shard in dataset.shards], len(dataset.variants)
    records = np.concatenate([dataset.samples(s).records for s in range(len(counts))])
    entries = [dataset.captions(s).entries[:-1].reshape(-1, variants) for s in range(len(counts))]
    entries = np.concatenate(entries).tolist()
    weights = [1.0, 0.0, 5.0, *[0.5] * (variants - 3)]
    options = _native.ReaderOptions()
    options.seed, options.global_batch_size, options.window_shards = seed, batch_size, 2
    options.captions, options.flip = policy, True
    options.weights = weights if policy == "weights" else []
    options.scale_low, options.scale_high = scale
    reader = _native.BatchReader(shard_files(dataset), options)
    firsts, total = np.cumsum([0, *counts]), sum(counts)
    orders = {epoch: epoch_order(counts, seed, epoch, 2) for epoch in (0, 1)}
    for k in (0, total // batch_size):  # the second runs into the next epoch
        batch = reader.plan(k)
        for i in range(batch_size):
            epoch, place = divmod(k * batch_size + i, total)
            shard, index = orders[epoch][place]
            sample = int(firsts[shard]) + index
            width, height = int(records[sample]["width"]), int(records[sample]["height"])
            assert (batch.samples[i], batch.epochs[i]) == (sample, epoch)
            assert batch.drawn_variants[i] == draw_variant(
                policy, weights, variants, entries[sample], sample, epoch, seed
            )
            assert batch.windows[i].tolist() == draw_window(
                width, height, sample, epoch, seed, scale, ratio
            )
            assert batch.mirrors[i] == philox([sample, epoch, CROP, 10], seed, 0)[0] >> 63
