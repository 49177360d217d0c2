"""How far an epoch's order takes samples apart: windows of shards against shuffle buffers.

    python benchmarks/shuffle.py [--out docs/shuffle.png]

1,000 shards of 1,000 samples. laclip permutes the shards and orders windows of them by a keyed
bijection, in 12 bytes a shard. DALI's and webdataset's readers read shard after shard (in a random
order, webdataset) through a buffer of encoded samples and give out a random one of it; their usual
size is 1,000 samples, which at 40 kB each hold 40 MB. For each sample: how far from it in the order
stands the sample that follows it on disk? A perfect shuffle spreads the distances over the epoch.
"""

import argparse
import random
from pathlib import Path

import matplotlib
import numpy as np

from laclip import _native

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHARDS, SAMPLES = 1_000, 1_000
TOTAL = SHARDS * SAMPLES


def windowed(window):
    order = _native.EpochOrder([SAMPLES] * SHARDS, 0, 0, window)
    return np.array(
        [shard * SAMPLES + index for shard, index in map(order.__getitem__, range(TOTAL))]
    )


def buffered(size, shuffle_shards):
    rng = random.Random(0)
    shards = list(range(SHARDS))
    if shuffle_shards:
        rng.shuffle(shards)
    stream = (shard * SAMPLES + i for shard in shards for i in range(SAMPLES))
    buffer, order = [], []
    for sample in stream:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        place = rng.randrange(size)
        order.append(buffer[place])
        buffer[place] = sample
    rng.shuffle(buffer)
    return np.array(order + buffer)


def distances(order):
    """In the order, between samples that are neighbours in a shard."""
    place = np.empty(TOTAL, np.int64)
    place[order] = np.arange(TOTAL)
    return np.abs(np.diff(place.reshape(SHARDS, SAMPLES), axis=1)).ravel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs/shuffle.png"
    )
    options = parser.parse_args()
    orders = {
        "laclip, window of 4 shards": windowed(4),
        "laclip, 16 shards (default)": windowed(16),
        "laclip, 64 shards": windowed(64),
        "webdataset, buffer of 1,000": buffered(1_000, True),
        "DALI, buffer of 1,000": buffered(1_000, False),
        "perfect shuffle": np.random.default_rng(0).permutation(TOTAL),
    }
    figure, axes = plt.subplots(figsize=(7, 3.6))
    print("| order | median distance | within 256 | shards in 1,000 samples |")
    print("| --- | --- | --- | --- |")
    for name, order in orders.items():
        assert len(np.unique(order)) == TOTAL
        apart = np.sort(distances(order))
        mixed = np.mean([len(set(order[i : i + 1000] // SAMPLES)) for i in range(0, TOTAL, 10_000)])
        near = np.searchsorted(apart, 256) / len(apart)
        print(f"| {name} | {apart[len(apart) // 2]:,} | {near:.2%} | {mixed:.1f} |")
        chosen = apart[:: len(apart) // 2000]
        style = "--" if "buffer" in name else ":" if "perfect" in name else "-"
        axes.plot(np.maximum(chosen, 1), np.linspace(0, 1, len(chosen)), style, label=name)
    axes.set(
        xscale="log", xlim=(1, TOTAL), ylim=(0, 1), ylabel="share of neighbours at most so far"
    )
    axes.set_xlabel("distance in the epoch of two samples that are neighbours on disk")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.out, dpi=80)


if __name__ == "__main__":
    main()
