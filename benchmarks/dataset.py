"""Rates of the dataset tools beside plain Python, and the cost of opening 41,400 shards.

    python benchmarks/dataset.py [index] [tokenize] [open]

tokenize compares with Hugging Face tokenizers: put them on PYTHONPATH from an environment of their
own. Records go to benchmarks/results/dataset.jsonl. Both sides run in turn on the same files, on
one core, from the page cache; their results are checked to be equal first.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Record, append, facts
from PIL import Image

from laclip import _native
from laclip.dataset import SAMPLE_RECORD, open_dataset
from laclip.prepare.folder import samples_summary, write_manifest
from laclip.prepare.index import index
from laclip.prepare.tokenize import MAX_TOKENS, tokenize
from laclip.tokenizer import ReferenceTokenizer

RESULTS = Path(__file__).parent / "results" / "dataset.jsonl"
EMOJI = Path(__file__).parent.parent / "examples" / "emoji" / "train"
SHARDS, DISTINCT, SHARD_SAMPLES = 41_400, 207, 2_000


def measure(functions, rounds):
    """Seconds of processor time of each function, the functions in turn.

    All of them run on one thread from the page cache, so this is what the clock shows on an idle
    machine, and others on a shared one do not disturb it.
    """
    times = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, own in zip(functions, times, strict=True):
            begin = time.process_time()
            function()
            own.append(time.process_time() - begin)
    return times


def record(subject, name, shape, seconds, amount, unit, **extra):
    """One case in the harness's form; times in milliseconds."""
    low, median, high = np.percentile(seconds, [20, 50, 80]).tolist()
    print(f"{name:24} {shape!s:56} {amount / median:12,.3f} {unit}")
    times = median * 1e3, low * 1e3, high * 1e3, len(seconds)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    clock = {"clock": "processor", **extra}
    rate = (amount / median, unit, memory, None, clock)
    return Record(subject, name, shape, "-", *times, *rate, **facts("cpu"))


def words(rng, count):
    text = [json.loads(line)["text"] for line in (EMOJI / "sentence.jsonl").open()]
    text = [own for own in text if own.isascii()]  # curly quotes: the rival does not clean them
    return [f"{rng.choice(text)} {rng.choice(text)[:30]}" for _ in range(count)]


def write_tar(path, samples, image_bytes, rng, prefix=""):
    """A shard in img2dataset's layout: valid JPEG headers, noise of a photograph's size behind."""
    image = io.BytesIO()
    Image.new("RGB", (256, 256)).save(image, "JPEG")
    captions = words(rng, samples)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, caption in enumerate(captions):
            size = rng.randrange(image_bytes // 2, image_bytes * 3 // 2)
            data = image.getvalue() + rng.randbytes(max(0, size - len(image.getvalue())))
            extra = json.dumps({"key": f"{prefix}{i:09}", "width": 256, "height": 256}).encode()
            for extension, payload in (("jpg", data), ("txt", caption.encode()), ("json", extra)):
                member = tarfile.TarInfo(f"{prefix}{i:09}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))


def python_scan(path):
    """What a script does: tarfile, and Pillow for the size."""
    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                with Image.open(tar.extractfile(member)) as image:
                    found.append((member.offset_data, member.size, *image.size))
    return found


def bench_index(folder, rng):
    path = folder / "00000.tar"
    write_tar(path, 4_000, 50_000, rng)
    size = path.stat().st_size
    scan = _native.scan_tar(str(path))
    ours = np.frombuffer(scan["records"], SAMPLE_RECORD)[["offset", "bytes", "width", "height"]]
    assert ours.tolist() == python_scan(path)

    def read_only():
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(1 << 20)
            while file.readinto(buffer):
                pass

    times = measure(
        [lambda: _native.scan_tar(str(path)), lambda: python_scan(path), read_only], rounds=7
    )
    shape = {"tar_bytes": size, "images": 4_000}
    return [
        record("index", name, shape, own, size / 1e9, "GB/s")
        for name, own in zip(
            ("index scan + XXH64", "tarfile + Pillow", "read alone"), times, strict=True
        )
    ]


def rival_tokenizer():
    """CLIP's tokenizer as transformers builds it for Hugging Face tokenizers."""
    import tokenizers
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    twin = ReferenceTokenizer()
    vocabulary = {symbol: i for i, symbol in enumerate(twin.symbols)}
    model = models.BPE(vocab=vocabulary, merges=list(twin.ranks), end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def python_tokenize(folder, files, tokenizer):
    """What a script does: a dict of rewrites by key, tarfile for the originals, one big array."""
    rewrites = []
    for path in files.values():
        with open(path) as file:
            rewrites.append({(e := json.loads(line))["key"]: e["text"] for line in file})
    texts = []
    with tarfile.open(folder / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".txt"):
                key = member.name[:-4]
                texts.append(tar.extractfile(member).read().decode())
                texts += [own.get(key, "") for own in rewrites]
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    ids = [encoding.ids[:MAX_TOKENS] for encoding in encode(texts)]
    tokens = np.fromiter((token for own in ids for token in own), np.uint16)
    offsets = np.cumsum([0, *map(len, ids)])
    tokens.tofile(folder / "rival.tokens")
    offsets.tofile(folder / "rival.offsets")
    return tokens


def bench_tokenize(folder, rng):
    os.environ["RAYON_NUM_THREADS"] = "1"
    tokenizer = rival_tokenizer()
    samples, variants = 10_000, ("a", "b", "c", "d")
    write_tar(folder / "00000.tar", samples, 2_000, rng)
    files = {}
    for name in variants:
        files[name] = folder / f"{name}.jsonl"
        lines = [
            json.dumps({"key": f"{i:09}", "text": text}) + "\n"
            for i, text in enumerate(words(rng, samples))
        ]
        files[name].write_text("".join(lines))
    index(folder)
    tokenize(folder, files)
    table = open_dataset(folder).captions(0)
    assert np.array_equal(table.all_tokens, python_tokenize(folder, files, tokenizer))
    ours, rival = measure(
        [
            lambda: tokenize(folder, files),
            lambda: python_tokenize(folder, files, tokenizer),
        ],
        rounds=5,
    )
    count = samples * (1 + len(variants))
    average = statistics.mean(len(text) for text in words(rng, 1000))
    shape = {"captions": count, "characters": round(average)}
    disk = sum((folder / f"00000.{k}").stat().st_size for k in ("samples", "captions")) / samples
    return [
        record("tokenize", "laclip tokenize", shape, ours, count, "captions/s", disk=disk),
        record("tokenize", "dict + HF tokenizers", shape, rival, count, "captions/s", disk=0.0),
    ]


def bench_open(folder, rng):
    """41,400 shards: hard links to 207 distinct triples of real files, 2,000 samples each."""
    source = folder / "source"
    source.mkdir()
    for i in range(DISTINCT):
        write_tar(source / f"{i:05}.tar", SHARD_SAMPLES, 100, rng, prefix=f"{i:03}")
    index(source)
    tokenize(source)
    made = open_dataset(source)
    entries, captions = [], {}
    for i in range(SHARDS):
        own = made.shards[i % DISTINCT]
        for kind in ("tar", "samples", "captions"):
            os.link(source / f"{own.stem}.{kind}", folder / f"{i:05}.{kind}")
        entry = samples_summary(folder / f"{i:05}.samples")["shard"]
        entries.append(entry)
        captions[entry["name"]] = own.captions_checksum
    assert write_manifest(folder, entries, captions, ["original"], made.tokenizer, {})
    code = """
import sys, time, numpy, laclip.dataset as d
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024
before, begin = resident(), time.process_time()
data = d.open_dataset(sys.argv[1])
name = data.fingerprint
opened, after = time.process_time() - begin, resident()
begin = time.process_time()
for i in range(len(data.shards)):
    data.samples(i).key(7), data.captions(i).tokens(7, 0).sum()
print(opened, after - before, time.process_time() - begin, resident() - before, data.num_samples)
"""

    def limits():
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    runs = []
    for _ in range(5):
        out = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            preexec_fn=limits,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        runs.append([float(x) for x in out.split()])
    opened, memory, each, end_memory, samples = zip(*runs, strict=True)
    shape = {"shards": SHARDS, "samples": int(samples[0]), "open_files_allowed": 1024}
    unit = "shards/s"
    return [
        record("open", "open_dataset", shape, opened, SHARDS, unit, resident_mib=max(memory)),
        record(
            "open", "map and read each", shape, each, SHARDS, unit, resident_mib=max(end_memory)
        ),
    ]


def main():
    cases = {"index": bench_index, "tokenize": bench_tokenize, "open": bench_open}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(cases), choices=cases)
    chosen = parser.parse_args().cases
    for name in chosen:
        folder = Path(tempfile.mkdtemp(prefix="laclip-bench-"))
        try:
            append(cases[name](folder, random.Random(0)), RESULTS)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
