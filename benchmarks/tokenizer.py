"""Captions a second of laclip's tokenizer and its rivals, in one run on the same captions.

    apt-get install wordnet-base                  # English: WordNet's glosses, cut to clauses
    npm pack cldr-annotations-modern@45.0.0 && tar xzf cldr-annotations-modern-45.0.0.tgz
    python requirements/oracles.py benchmarks/tokenizer.py --annotations package/annotations

The multilingual set is the emoji names and keywords of Unicode's CLDR, in 91 languages. Python 3.11
or 3.12: instant-clip-tokenizer has no wheel for 3.13.

Ids are compared with OpenAI's first (through laclip's Python twin, which the tests hold to them). A
run is cold where the tokenizer is new or, as laclip's, keeps no words from call to call. Cases of
one thread are timed by the processor's clock, which a shared machine disturbs less; cases of two by
the wall's.
"""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "2"  # of Hugging Face's, where it is let use them

import instant_clip_tokenizer
import numpy as np
import tokenizers
from harness import facts
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

import laclip.tokenizer
from laclip.text_clean import WORDS

CONTEXT_LENGTH = 77
OURS = laclip.tokenizer.load_tokenizer()
RESULTS = Path(__file__).parent / "results"


def english_captions(folder):
    """WordNet's glosses and examples, cut to clauses of 30 to 100 characters."""
    captions = set()
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if "|" in line and not line.startswith("  "):
                for clause in line.split("|", 1)[1].split(";"):
                    captions.add(clause.strip().strip('"'))
    return sorted(caption for caption in captions if 30 <= len(caption) <= 100)


def multilingual_captions(folder):
    """An emoji's name and first keywords, in each language of CLDR (`xx`; not its regions)."""
    captions = set()
    for file in sorted(folder.glob("*/annotations.json")):
        if file.parent.name.isalpha() and file.parent.name != "und":
            for emoji in json.loads(file.read_text())["annotations"]["annotations"].values():
                captions.add(", ".join([*emoji.get("tts", []), *emoji.get("default", [])[:4]]))
    return sorted(captions)


class Laclip:
    """Each call is cold: no word outlives it. The tokenizer itself is made once."""

    def __init__(self, threads=1):
        self.tokenizer = OURS
        self.threads = threads
        self.out = None

    def prepare(self, texts):
        """The array that `out=` fills, its memory touched: a first touch is the machine's time."""
        self.out = np.full((len(texts), CONTEXT_LENGTH), 1, np.int32)

    def rows(self, texts):
        return self.tokenizer.encode_batch(texts, CONTEXT_LENGTH, self.threads, self.out)

    def ids(self, texts):
        tokens, offsets = self.tokenizer.encode_ragged(texts)
        return [tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]


class LaclipRagged(Laclip):
    def rows(self, texts):
        return self.tokenizer.encode_ragged(texts, self.threads)


class LaclipBatches(Laclip):
    """256 captions a call, as a loader would."""

    def rows(self, texts):
        for begin in range(0, len(texts), 256):
            self.tokenizer.encode_batch(texts[begin : begin + 256])


class Instant:
    def __init__(self):
        self.tokenizer = instant_clip_tokenizer.Tokenizer()

    def rows(self, texts):
        return self.tokenizer.tokenize_batch(texts, context_length=CONTEXT_LENGTH)

    def ids(self, texts):
        return [self.tokenizer.encode(text) for text in texts]


class HuggingFace:
    """What transformers builds for CLIP, padded and cut alike."""

    def __init__(self, threads=1):
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        twin = laclip.tokenizer.ReferenceTokenizer()
        model = BPE(
            vocab={symbol: i for i, symbol in enumerate(twin.symbols)},
            merges=list(twin.ranks),
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
            unk_token="<|endoftext|>",
        )
        self.tokenizer = tokenizers.Tokenizer(model)
        self.tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = Regex(WORDS[WORDS.index("'s") :])
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self.tokenizer.decoder = decoders.ByteLevel()

    def rows(self, texts):
        return self.tokenizer.encode_batch(texts)

    def ids(self, texts):
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]


class OpenClip:
    def __init__(self):
        self.tokenizer = SimpleTokenizer()

    def rows(self, texts):
        return self.tokenizer(texts, context_length=CONTEXT_LENGTH)

    def ids(self, texts):
        return [self.tokenizer.encode(text) for text in texts]


def seconds_of(make, texts, warm):
    tokenizer = make()
    tokenizer.rows(["é"])  # what is made once
    if isinstance(tokenizer, Laclip):
        tokenizer.prepare(texts)
    if warm:
        tokenizer.rows(texts)
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    tokenizer.rows(texts)
    return time.perf_counter() - wall, time.process_time() - processor


PACKAGES = ["ftfy", "regex", "tokenizers", "open_clip_torch", "instant-clip-tokenizer"]


def record(name, shape, seconds, count, unit, **more):
    low, middle, high = np.percentile(seconds, [20, 50, 80]).tolist()
    here = facts("cpu")
    return {
        "name": name,
        "shape": shape,
        "dtype": "str",
        "median": middle,
        "p20": low,
        "p80": high,
        "throughput": count / middle,
        "unit": unit,
        "peak_memory_mib": None,
        **here,
        "versions": here["versions"] | {package: version(package) for package in PACKAGES},
        **more,
    }


def measure(name, cases, texts, reference, rounds):
    """Interleaved rounds of each case on `texts`; a record each."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    tokens = sum(map(len, reference))
    times = {case: [] for case in cases}
    for _ in range(rounds):
        for case, (make, warm) in cases.items():
            times[case].append(seconds_of(make, texts, warm))
    records = []
    for case, (make, _) in cases.items():
        found = make().ids(texts) if case != "laclip batches of 256" else reference
        equal = sum(a == b for a, b in zip(found, reference)) / len(texts)
        wall, processor = zip(*times[case])
        clock = "wall" if "2 threads" in case else "processor"
        seconds = wall if clock == "wall" else processor
        median = statistics.median(seconds)
        records.append(
            record(
                f"tokenizer/{name}/{case}",
                [len(texts)],
                seconds,
                len(texts),
                "captions/s",
                bytes_per_caption=size / len(texts),
                megabytes_per_second=size / median / 1e6,
                nanoseconds_per_token=median / tokens * 1e9,
                ids_equal=equal,
                clock=clock,
                processor_seconds=statistics.median(processor),
                wall_seconds=statistics.median(wall),
            )
        )
        print_row(records[-1])
    return records


def print_row(row):
    print(
        f"{row['name']:58} {row['throughput']:>12,.0f} {row['unit']:10}"
        f" {row.get('megabytes_per_second', 0):8.2f} MB/s"
        f" {row.get('nanoseconds_per_token', 0):9.1f} ns/token"
        f"  ids equal {row.get('ids_equal', 1):.4%}",
        flush=True,
    )


START = """
import time
import numpy, laclip._native

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256

before, began = resident(), time.process_time()
from laclip.tokenizer import load_tokenizer
tokenizer = load_tokenizer()
tokenizer.encode("a photo of a cat")
ready, memory = time.process_time() - began, resident() - before
tokenizer.encode("é")
print(ready, memory, time.process_time() - began - ready, resident() - before)
"""


def measure_start(rounds):
    """Seconds and memory of the first text, and of the first one beyond ASCII, in new processes."""
    runs = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
        runs.append([float(x) for x in done.stdout.split()])
    columns = list(zip(*runs))
    rows = []
    for i, name in ((0, "start"), (2, "first text beyond ASCII")):
        memory = statistics.median(columns[i + 1])
        rows.append(record(f"tokenizer/{name}", [1], columns[i], 1, "1/s"))
        rows[-1]["peak_memory_mib"] = memory
        print(f"{rows[-1]['name']:58} {rows[-1]['median'] * 1e3:12.1f} ms {memory:14.1f} MiB")
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--annotations", type=Path, default=Path("package/annotations"))
    parser.add_argument("--captions", type=int, default=10_000, help="of each set, with rivals")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "tokenizer.json")
    arguments = parser.parse_args()

    english = english_captions(arguments.wordnet)
    multilingual = multilingual_captions(arguments.annotations)
    if not multilingual:
        parser.error(f"--annotations {arguments.annotations}: found no */annotations.json")
    rng = random.Random(0)
    rng.shuffle(english)
    rng.shuffle(multilingual)
    ours = {
        "laclip": (Laclip, False),
        "laclip 2 threads": (lambda: Laclip(2), False),
        "laclip ragged": (LaclipRagged, False),
        "laclip batches of 256": (LaclipBatches, False),
    }
    rivals = {
        "instant-clip-tokenizer": (Instant, False),
        "instant-clip-tokenizer warm": (Instant, True),
        "tokenizers": (HuggingFace, False),
        "tokenizers warm": (HuggingFace, True),
        "tokenizers warm 2 threads": (lambda: HuggingFace(2), True),
        "open_clip": (OpenClip, False),
        "open_clip warm": (OpenClip, True),
    }
    twin = laclip.tokenizer.ReferenceTokenizer()
    records = measure_start(arguments.rounds)
    for name, captions in (("english", english), ("multilingual", multilingual)):
        texts = captions[: arguments.captions]
        reference = [twin.encode(text) for text in texts]
        records += measure(name, ours | rivals, texts, reference, arguments.rounds)

    everything = english * 4
    worst = {
        "english, all clauses four times": everything,
        "multilingual, all": multilingual,
        "one word of a million letters": ["".join(rng.choices("aeinorst", k=1_000_000))],
        "words of random letters": [
            " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(7))
            for _ in range(20_000)
        ],
        "an entity in each": [f"{text} &amp; co" for text in english[:20_000]],
        "slow path: mojibake in each": [f"{text} â€™ cafÃ©" for text in english[:5_000]],
        "emoji in each": [f"{text} 😍👍🏽" for text in english[:20_000]],
        "curly quotes in each": [f"“{text}” – it’s" for text in english[:20_000]],
    }
    for name, texts in worst.items():
        ids = Laclip().ids(texts)
        some = range(0, len(texts), max(1, len(texts) // 300))
        if len(texts) > 1:
            assert all(ids[i] == twin.encode(texts[i]) for i in some)
        assert OURS.encode(texts[0]) == ids[0]
        cases = {"laclip": ours["laclip"], "laclip 2 threads": ours["laclip 2 threads"]}
        records += measure(name, cases, texts, ids, arguments.rounds)

    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
