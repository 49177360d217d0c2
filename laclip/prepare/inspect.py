"""laclip inspect: look at a dataset, as text or as a page.

laclip inspect FOLDER [--bad] [--sample KEY] [--html PAGE.html]
"""

import argparse
import base64
import html
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from laclip import _native
from laclip.dataset import (
    BAD,
    CAPTION_MISSING,
    CAPTION_SHORT,
    DECODED,
    FORMATS,
    NO_ROW,
    REASONS,
    Dataset,
    open_dataset,
)
from laclip.prepare.captions import LENGTHS, MAX_BYTES, VariantCount, aligned, count_captions
from laclip.prepare.folder import write_whole
from laclip.tokenizer import load_tokenizer

SIZES = (0, 64, 128, 256, 512, 1024, 1 << 32)  # of the shorter side, for the summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a dataset")
    parser.add_argument("--sample", metavar="KEY", help="show one sample with all its variants")
    parser.add_argument("--bad", action="store_true", help="list every bad sample")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page of random samples")
    parser.add_argument("--count", type=int, default=60, help="samples on the page (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="which samples (default: 0)")
    parser.add_argument("--tokenizer", default="clip", help="clip (default) or sentencepiece:FILE")


def run(args: argparse.Namespace) -> int:
    dataset = open_dataset(args.folder)
    if args.bad:
        for line in bad_samples(dataset):
            print(line)
        if not any(shard.bad for shard in dataset.shards):
            print(f"{args.folder}: no bad samples", file=sys.stderr)
        return 0
    if args.sample is not None:
        print(Viewer(dataset, args.tokenizer).describe(*find_key(dataset, args.sample)))
    elif args.html is not None:
        page = Viewer(dataset, args.tokenizer).page(pick(dataset, args.count, args.seed))
        write_whole(args.html, [page.encode()])
        print(f"{args.html}: {min(args.count, dataset.num_samples)} samples, {len(page):,} bytes")
    else:
        print(summary(dataset))
    return 0


def summary(dataset: Dataset) -> str:
    """What a dataset holds. Reads all sidecars, a shard at a time, and no tar."""
    bad: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    sizes = np.zeros(len(SIZES) - 1, np.int64)
    counts = [VariantCount() for _ in dataset.variants]
    image_bytes = tokens = decoded = 0
    for shard in range(len(dataset.shards)):
        records = dataset.samples(shard).records
        good = records[records["flags"] & BAD == 0]
        for reason, times in zip(*np.unique(records["reason"], return_counts=True), strict=True):
            bad[_reason(int(reason))] += int(times) if reason else 0
        for kind, times in zip(*np.unique(good["format"], return_counts=True), strict=True):
            formats[FORMATS[kind]] += int(times)
        sizes += np.histogram(np.minimum(good["width"], good["height"]), SIZES)[0]
        decoded += int(np.count_nonzero(records["flags"] & DECODED))
        image_bytes += int(records["bytes"].sum(dtype=np.int64))
        if dataset.variants:
            table = dataset.captions(shard)
            tokens += len(table.all_tokens)
            for variant, count in enumerate(counts):
                count.add(count_captions(table, variant))
    n = dataset.num_samples
    lines = [
        f"{dataset.path}",
        f"fingerprint  {dataset.fingerprint}",
        f"samples      {n:,} in {len(dataset.shards):,} shards, {sum(bad.values()):,} bad, "
        f"{'all' if decoded == n else f'{decoded:,}'} decoded when indexed",
        *(f"  bad        {times:,} x {reason}" for reason, times in bad.items() if times),
        f"images       {image_bytes / 1e6:,.1f} MB, "
        + ", ".join(f"{times:,} {kind}" for kind, times in formats.items()),
        "  shorter    "
        + ", ".join(
            f"{times:,} from {low} px" for low, times in zip(SIZES, sizes.tolist()) if times
        ),
        f"tokenizer    {dataset.tokenizer or 'none yet: run laclip tokenize'}",
    ]
    if dataset.variants:
        lines.append(f"tokens       {tokens:,}, {tokens / max(n, 1):.1f} a sample")
        rows = [["variant", "missing", "short", *LENGTHS]]
        for name, count in zip(dataset.variants, counts, strict=True):
            rows.append([name, *map(str, (count.missing, count.short, *count.lengths))])
        lines += [*aligned(rows), "  (the last columns count captions by tokens)"]
    return "\n".join(lines)


def bad_samples(dataset: Dataset) -> Iterator[str]:
    """File, sample, key, place and reason of every bad sample, separated by tabs."""
    for shard, entry in enumerate(dataset.shards):
        if entry.bad:
            table = dataset.samples(shard)
            for i in np.flatnonzero(table.records["flags"] & BAD).tolist():
                record = table.records[i]
                place = f"byte {record['offset']}" if record["offset"] else "-"
                reason = _reason(int(record["reason"]))
                yield "\t".join((entry.name, f"sample {i}", table.key(i), place, reason))


def _reason(reason: int) -> str:
    return REASONS[reason] if reason < len(REASONS) else f"reason {reason}"


def find_key(dataset: Dataset, key: str) -> tuple[int, int]:
    """(shard, index) of the first sample with this key. Raises ValueError where there is none."""
    for shard in range(len(dataset.shards)):
        keys = dataset.samples(shard).keys()
        if key in keys:
            return shard, keys.index(key)
    example = dataset.samples(0).key(0)
    raise ValueError(
        f"{dataset.path}: no sample has the key {key!r}; the first one's is {example!r}"
    )


def pick(dataset: Dataset, count: int, seed: int) -> list[tuple[int, int]]:
    """(shard, index) of `count` different samples, in the order of the files."""
    count = min(count, dataset.num_samples)
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    while len(chosen) < count:
        draws = rng.integers(0, dataset.num_samples, count - len(chosen))
        chosen.update(draws.tolist())
    ends = np.cumsum([shard.samples for shard in dataset.shards])
    places = []
    for position in sorted(chosen):
        shard = int(np.searchsorted(ends, position, side="right"))
        places.append((shard, position - (int(ends[shard - 1]) if shard else 0)))
    return places


class Viewer:
    """Samples of a dataset as text and as HTML, captions as training sees them."""

    def __init__(self, dataset: Dataset, tokenizer: str):
        self.dataset = dataset
        self.tokenizer = load_tokenizer(tokenizer) if dataset.variants else None
        if self.tokenizer and self.tokenizer.fingerprint != dataset.tokenizer:
            raise ValueError(
                f"{dataset.path}: was tokenized with {dataset.tokenizer}, --tokenizer "
                f"{tokenizer} is {self.tokenizer.fingerprint}. Name the dataset's own"
            )

    def captions(self, shard: int, index: int) -> list[tuple[str, str, str]]:
        """(variant, text from its tokens, note) of every variant."""
        if self.tokenizer is None:
            return []
        table = self.dataset.captions(shard)
        found = []
        for variant, name in enumerate(self.dataset.variants):
            flags = table.flags(index, variant)
            tokens = table.tokens(index, variant).tolist()
            note = "missing" if flags & CAPTION_MISSING else f"{len(tokens)} tokens"
            note += ", short" if flags & CAPTION_SHORT else ""
            found.append((name, self.tokenizer.decode(tokens).strip(), note))
        return found

    def image(self, shard: int, index: int) -> bytes:
        record = self.dataset.samples(shard).records[index]
        with open(self.dataset.tar_path(shard), "rb") as file:
            file.seek(int(record["offset"]))
            return file.read(int(record["bytes"]))

    def facts(self, shard: int, index: int) -> str:
        record = self.dataset.samples(shard).records[index]
        facts = f"{record['width']} x {record['height']} {FORMATS[record['format']]}, "
        facts += f"{record['bytes']:,} bytes"
        if record["orientation"] != 1:
            facts += f", EXIF orientation {record['orientation']}"
        if record["row"] != NO_ROW:
            facts += f", row {record['row']}"
        if record["flags"] & BAD:
            facts += f", BAD: {_reason(int(record['reason']))}"
        return facts

    def describe(self, shard: int, index: int) -> str:
        """One sample with all its variants, as text."""
        samples = self.dataset.samples(shard)
        record = samples.records[index]
        name = self.dataset.shards[shard].name
        lines = [
            f"{samples.key(index)}: sample {index} of {name}",
            f"  image at byte {record['offset']}: {self.facts(shard, index)}",
        ]
        found = _native.read_tar_texts(str(self.dataset.tar_path(shard)), "txt", MAX_BYTES)
        texts = dict(reversed(found))  # the first of a key, as laclip tokenize takes it
        if samples.key(index) in texts:
            lines.append(f"  KEY.txt: {texts[samples.key(index)].decode(errors='replace')!r}")
        for variant, text, note in self.captions(shard, index):
            lines.append(f"  {variant} ({note}): {text}")
        return "\n".join(lines)

    def page(self, places: list[tuple[int, int]]) -> str:
        """A page of samples that needs no other file: images inside, every text escaped."""
        cards = []
        for shard, index in places:
            samples = self.dataset.samples(shard)
            record = samples.records[index]
            picture = "<div class=none>no image</div>"
            if record["format"] and record["bytes"]:
                kind = FORMATS[record["format"]]
                data = base64.b64encode(self.image(shard, index)).decode()
                picture = f'<img src="data:image/{kind};base64,{data}" alt="">'
            rows = "".join(
                f"<dt>{html.escape(variant)}<dd>{html.escape(text) or '<i>missing</i>'}"
                for variant, text, _ in self.captions(shard, index)
            )
            bad = " class=bad" if record["flags"] & BAD else ""
            cards.append(
                f"<article{bad}>{picture}<h2>{html.escape(samples.key(index))}</h2>"
                f"<p>{html.escape(self.facts(shard, index))}</p><dl>{rows}</dl></article>"
            )
        title = html.escape(str(self.dataset.path))
        return _PAGE.format(
            title=title, summary=html.escape(summary(self.dataset)), cards="\n".join(cards)
        )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #222; background: #f4f4f2 }}
pre {{ background: #fff; padding: 12px; overflow-x: auto; border-radius: 6px }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px }}
article {{ background: #fff; border-radius: 6px; padding: 12px; overflow-wrap: anywhere }}
article.bad {{ outline: 2px solid #c33 }}
img, .none {{ display: block; height: 128px; max-width: 100%; object-fit: contain; margin: auto }}
.none {{ line-height: 128px; text-align: center; color: #999 }}
h2 {{ font-size: 14px; margin: 8px 0 0 }}
p {{ color: #666; margin: 0 0 8px; font-size: 12px }}
dt {{ color: #666; font-size: 12px }}
dd {{ margin: 0 0 4px }}
</style>
<h1>{title}</h1>
<pre>{summary}</pre>
<main>
{cards}
</main>
</html>
"""
