"""Nanoseconds a sample to draw, find and lay out captions, at 10 thousand to 400 million samples.

    apt-get install wordnet-base     # real English: its glosses are the captions
    python benchmarks/captions.py --work FOLDER [--out benchmarks/results/captions.jsonl] [--bad]

FOLDER gets 200 distinct shards (7 GB; made once by laclip's own tools: 10,000 samples, an original
and four rewrites each) and data sets of 1, 1,000 and 40,000 shards that are hard links to them.

Timed is BatchReader.plan, one Python call a batch: the epoch order, the bad-sample check, the drawn
variant, its tokens end to end, and the crop window beside; no image is read. Warm: sidecars in the
page cache, read in epoch order. Cold: a whole window of shards from the disk, the page cache of
these files dropped before. Memory and first batch are measured in fresh processes.

With --bad instead, in a minute: warm, of 8 shards each (300 MB) in which a share of the samples has
no caption, and is replaced by others.

Then what the text tower does with such a batch on the host, between two steps: it checks the
captions and lays them out in groups; and with padded ones, whose ends it has to find first.
"""

import argparse
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import harness
import torch

from laclip import _native
from laclip.captions import PackedCaptions, pack
from laclip.config import DataConfig, ModelConfig, TextConfig, VisionConfig
from laclip.dataset import open_dataset
from laclip.loader import reader_options, shard_files
from laclip.prepare.index import index
from laclip.prepare.tokenize import tokenize
from laclip.tokenizer import load_tokenizer

SHARD_SAMPLES, DISTINCT = 10_000, 200
SIZES = (1, 1_000, 40_000)  # shards
BAD_SHARES, BAD_SHARDS = (0.0, 0.0001, 0.01, 0.5), 8
REWRITES = ("first", "second", "third", "fourth")
BATCH = 4096
PNG = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636800000082008177cd72b60000000049454e44ae426082"
)


def clauses(folder):
    """WordNet's glosses and examples, cut to clauses."""
    found = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if "|" in line and not line.startswith("  "):
                found.update(c.strip(' "') for c in line.split("|", 1)[1].split(";"))
    return sorted(clause for clause in found if len(clause) >= 20)


def member(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def build_shards(folder, wordnet, count=DISTINCT, bad=0.0):
    """Shards whose images are one pixel and whose captions, but those of a share of the samples,
    are one or two clauses."""
    texts = clauses(wordnet)
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        path = folder / f"{shard:05}.tar"
        if path.exists():
            continue
        rng = random.Random(shard)

        def caption(rng=rng):
            return ", ".join(rng.choices(texts, k=rng.choice((1, 1, 2))))

        content = io.BytesIO()
        for i in range(SHARD_SAMPLES):
            key = f"{shard:05}{i:04}"
            content.write(member(f"{key}.png", PNG))
            if rng.random() >= bad:
                content.write(member(f"{key}.txt", caption().encode()))
            rewrites = {name: caption() for name in REWRITES}
            content.write(member(f"{key}.json", json.dumps(rewrites).encode()))
        content.write(bytes(1024))
        path.write_bytes(content.getbuffer())
    index(folder, jobs=2)
    tokenize(folder, {name: f"json:{name}" for name in REWRITES}, jobs=2)


def link_shards(distinct, folder, count):
    """A data set of `count` shards, hard links to the distinct ones in turn."""
    manifest = json.loads((distinct / "dataset.json").read_text())
    shards = manifest["shards"]
    manifest["shards"] = [{**shards[i % len(shards)], "name": f"{i:05}.tar"} for i in range(count)]
    if not (folder / "dataset.json").exists():
        folder.mkdir(exist_ok=True)
        for i, suffix in itertools.product(range(count), ("tar", "samples", "captions")):
            source = distinct / f"{i % len(shards):05}.{suffix}"
            (folder / f"{i:05}.{suffix}").hardlink_to(source)
        (folder / "dataset.json").write_text(json.dumps(manifest))


def open_reader(folder, batch=BATCH):
    dataset = open_dataset(folder)
    tokenizer = load_tokenizer()
    options = reader_options(DataConfig(reader_threads=1), tokenizer, context_length=77)
    options.global_batch_size = batch
    return _native.BatchReader(shard_files(dataset), options)


def layout_cases(folder, batch):
    # Not at the top: the processes that measure the loader's memory need none of it.
    from laclip.attention import group_captions
    from laclip.model import build_model

    text = TextConfig(width=8, depth=1, heads=1)
    vision = VisionConfig(width=8, depth=1, heads=1)
    config = ModelConfig(embed_dim=8, vision=vision, text=text)
    tokenizer = load_tokenizer()
    tower = build_model(config, tokenizer.vocab_size, tokenizer.eot_token).text
    read = open_reader(folder, batch).plan(0)
    token_ids, cu_seqlens = torch.from_numpy(read.token_ids), torch.from_numpy(read.cu_seqlens)
    packed = PackedCaptions(token_ids, cu_seqlens, (batch,))
    padded = torch.zeros(batch, text.context_length, dtype=torch.int32)
    for row, caption in zip(padded, token_ids.split(packed.lengths.tolist())):
        row[: len(caption)] = caption

    def lay_out(captions):
        tower.check(captions)
        return group_captions(captions, text.context_length)

    runs = {
        "packed": lambda _: lay_out(packed),
        "padded": lambda _: lay_out(pack(padded, tokenizer.eot_token)),
    }
    for found, expected in zip(runs["packed"](0), runs["padded"](0)):
        assert found == expected if isinstance(found, tuple) else torch.equal(found, expected)
    return [harness.Case(name, run, work=batch, unit="captions/s") for name, run in runs.items()]


def drop_page_cache(distinct):
    for path in distinct.iterdir():
        if path.suffix in (".samples", ".captions"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_case(folder, distinct):
    """A window of shards from the disk; nothing may map the files while the cache is dropped."""

    def prepare(turn):
        drop_page_cache(distinct)
        return open_reader(folder, min(BATCH, folder_samples)), turn

    folder_samples = open_dataset(folder).num_samples
    window = min(16 * SHARD_SAMPLES, folder_samples)
    batches = max(1, window // BATCH)

    def run(state):
        reader, turn = state
        for i in range(batches):
            reader.plan(turn * batches + i)

    work = batches * BATCH
    return harness.Case("cold", run, prepare, work, "M samples/s", 1e6)


def warm_case(folder, _, name="warm"):
    reader = open_reader(folder)
    batches = itertools.count()
    for _ in range(64):  # the files come into the cache
        reader.plan(next(batches))
    return harness.Case(
        name, lambda _: reader.plan(next(batches)), work=BATCH, unit="M samples/s", divisor=1e6
    )


def measure_bad(work, wordnet, out):
    cases = []
    for share in BAD_SHARES:
        folder = work / f"bad_{share:g}"
        if not (folder / "dataset.json").exists():
            build_shards(folder, wordnet, BAD_SHARDS, share)
        cases.append(warm_case(folder, None, f"{share:.2%} bad"))
    shape = {"samples": BAD_SHARDS * SHARD_SAMPLES, "variants": 1 + len(REWRITES)}
    records = harness.compare(
        "captions where samples are bad",
        cases,
        shape=shape,
        dtype="int32",
        device="cpu",
        seconds=4,
        most=400,
    )
    for record in records:
        record.extra["ns a sample"] = record.median * 1e6 / BATCH
    harness.append(records, out)
    print(harness.table(records))


def fresh_process(folder, position):
    """Seconds to the first batch, and the memory after 100 batches, of a new process."""
    command = [sys.executable, __file__, "--probe", str(folder), "--position", str(position)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def memory():
    status = Path("/proc/self/status").read_text()
    return {
        name: int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024
        for name in ("RssAnon", "RssFile")
    }


def probe(folder, position):
    before = memory()["RssAnon"]
    begin = time.perf_counter()
    reader = open_reader(folder, 512)
    reader.seek(int(position * (len(reader) // 512)))
    reader.next()
    first = time.perf_counter() - begin
    for _ in range(100):
        reader.next()
    after = memory()
    print(
        json.dumps(
            {
                "first_batch_s": first,
                "anonymous_mib": after["RssAnon"],
                "grown_mib": after["RssAnon"] - before,
                "page_cache_mib": after["RssFile"],
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the shards (7 GB)")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument(
        "--out", type=Path, default=harness.ROOT / "benchmarks/results/captions.jsonl"
    )
    parser.add_argument("--bad", action="store_true", help="measure bad samples instead")
    parser.add_argument("--probe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--position", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        return probe(options.probe, options.position)
    if options.bad:
        return measure_bad(options.work, options.wordnet, options.out)
    distinct = options.work / "distinct"
    if not (distinct / "dataset.json").exists():
        build_shards(distinct, options.wordnet)
    records = []
    for count in SIZES:
        folder = options.work / str(count)
        link_shards(distinct, folder, count)
        shape = {"samples": count * SHARD_SAMPLES, "variants": 1 + len(REWRITES)}
        measured = []
        for make in (cold_case, warm_case):
            case = make(folder, distinct)
            (record,) = harness.compare(
                "captions", [case], shape=shape, dtype="int32", device="cpu", seconds=4, most=400
            )
            record.extra["ns a sample"] = record.median * 1e6 / case.work
            measured.append(record)
        probes = [fresh_process(folder, position) for position in (0.0, 0.37, 0.99)]
        for record in measured:
            record.extra |= {name: max(p[name] for p in probes) for name in probes[0]}
        harness.append(measured, options.out)
        records += measured
    torch.set_num_threads(1)
    for batch in (1024, 4096):
        measured = harness.compare(
            "captions laid out",
            layout_cases(options.work / "1", batch),
            shape={"captions": batch},
            dtype="int32",
            device="cpu",
            seconds=4,
            most=400,
        )
        harness.append(measured, options.out)
        records += measured
    print(harness.table(records))


if __name__ == "__main__":
    main()
