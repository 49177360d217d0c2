"""Hundreds of thousands of batches: memory, open and mapped files and threads must not grow.

    python benchmarks/soak_loader.py [--reader 1000000] [--loader 200000] [--out FILE]

First the batch reader alone, with jumps, bad samples and batches kept for a while; then the loader
with DALI, an image that fails from time to time among them. Fails if a count is larger in the
second half than it ever was in the first, or memory by more than 4 MiB.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import torch
from harness import ROOT, facts

from laclip import _native
from laclip.config import DataConfig
from laclip.dataset import open_dataset
from laclip.loader import Loader, reader_options, shard_files
from laclip.tokenizer import load_tokenizer

TRAIN = ROOT / "examples" / "emoji" / "train"
LENGTH = 32


def usage():
    status = Path("/proc/self/status").read_text()
    own = Path("/proc/self")
    return {
        "anonymous_mib": int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024,
        "files": len(list((own / "fd").iterdir())),
        # Files alone: malloc opens its arenas when threads first meet, early or late.
        "mapped_files": sum(" /" in line for line in (own / "maps").read_text().splitlines()),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),
    }


def soak(name, step, batches):
    """Runs step(k) for each batch; returns the record of the two halves' maxima."""
    halves = [[], []]
    begin = time.perf_counter()
    for k in range(batches):
        step(k)
        if k % max(1, batches // 400) == 0:
            halves[2 * k // batches].append(usage())
    seconds = time.perf_counter() - begin
    # The start fills caches and queues: it is no part of the first half.
    first, second = (
        {key: max(sample[key] for sample in half) for key in half[0]}
        for half in (halves[0][20:], halves[1])
    )
    grown = [
        key for key in first if second[key] > first[key] + (4 if key == "anonymous_mib" else 0)
    ]
    record = {"subject": "soak", "name": name, "batches": batches, "seconds": seconds}
    record |= {"first_half": first, "second_half": second, "grown": grown, **facts("cpu")}
    print(json.dumps(record), flush=True)
    return record


def reader_step():
    options = reader_options(DataConfig(window_shards=1), load_tokenizer(), LENGTH)
    options.global_batch_size, options.threads, options.prefetch = 32, 2, 4
    reader = _native.BatchReader(shard_files(open_dataset(TRAIN)), options)
    kept = deque(maxlen=5)

    def step(k):
        if k % 5000 == 4999:
            reader.seek(k * 7919 % 10**9)
        if k % 100 == 0:
            reader.mark_bad([k % 64])
        kept.append(reader.next())
        if k % 50 == 0:
            kept.append(reader.read(k))

    return step


def loader_step(folder):
    """Every 128th image has no valid Huffman table or PNG stream; a new loader every 2,000 batches
    finds them all again. (Where libjpeg gives up later, DALI 2.4 loses the decoded image's memory,
    so that such damage would hide growth of our own.)"""
    damaged = folder / "train"
    shutil.copytree(TRAIN, damaged)
    dataset = open_dataset(damaged)
    numbers = itertools.count()
    for shard in range(len(dataset.shards)):
        with dataset.tar_path(shard).open("r+b") as tar:
            for record in dataset.samples(shard).records:
                if next(numbers) % 128 == 0:
                    tar.seek(int(record["offset"]))
                    at = max(tar.read(int(record["bytes"])).find(b"\xff\xc4") + 5, 40)
                    tar.seek(int(record["offset"]) + at)
                    tar.write(b"\xff" * 16)
    state = {}

    def step(k):
        if k % 2000 == 0:
            state["loader"] = Loader(
                [open_dataset(damaged)],
                DataConfig(max_bad_fraction=1.0),
                load_tokenizer(),
                seed=k,
                global_batch_size=8,
                image_size=16,
                context_length=LENGTH,
                device=torch.device("cpu"),
            )
        next(state["loader"])

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=int, default=1_000_000, help="batches of the reader alone")
    parser.add_argument("--loader", type=int, default=200_000, help="batches through DALI")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak_loader.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records = [
            soak("reader", reader_step(), options.reader),
            soak("loader with DALI", loader_step(Path(folder)), options.loader),
        ]
    with options.out.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    sys.exit(any(record["grown"] for record in records))


if __name__ == "__main__":
    main()
