"""One HTML page of a run: how rewrites differ from their captions, what was rejected, samples."""

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from laclip import _native
from laclip.rewrite.filters import REASONS
from laclip.rewrite.job import read_lines
from laclip.whole_files import whole_file

MEASURED = 50_000  # captions that the figures are of, and at most read for them
SHOWN = 60  # samples, and as many rejects
FARTHEST = 20  # in meaning, shown where it was measured
_STYLE = """
:root { color-scheme: light dark; --soft: #8882; --bar: #1f5fa8; --other: #d08a2e }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100%; margin-bottom: 1.4rem }
td, th { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--soft) }
td, th { vertical-align: top }
td:first-child, th:first-child, td.left, th.left { text-align: left } .soft { opacity: .7 }
.bar { height: .6rem; background: var(--bar); border-radius: 2px; margin: 1px 0 }
.bar.other { background: var(--other) } td.wide { width: 60% }
"""


def write_page(folder: Path, finished: list[dict]) -> Path:
    """Write FOLDER/report.html from the files of finished shards (their counts as in
    finished.jsonl); returns its path."""
    job = json.loads((folder / "job.json").read_bytes())
    rewrites = _read(folder / "shards", finished)
    rejects = _read(folder / "rejects", finished)
    captions = sum(entry["captions"] for entry in finished)
    accepted = sum(entry["accepted"] for entry in finished)
    told = [f"{accepted:,} rewrites of {captions:,} captions ({accepted / max(captions, 1):.1%})"]
    told += [str(job.get("model") or job["method"])]
    told += [f"prompts {job['prompts'][0]}"] if "prompts" in job else []
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        f"<title>{html.escape(folder.name)} - laclip</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(folder.name)}</h1>",
        f"<p class=soft>{html.escape(' · '.join(told))}</p>",
        "<h2>Rejected</h2>",
        _reasons(finished, captions),
    ]
    if rewrites:
        pairs = [(entry["source"], entry["text"]) for entry in rewrites]
        parts += [
            f"<h2>Rewrites beside their captions ({len(pairs):,} of them)</h2>",
            _figures(pairs),
            '<h2>Words a text <span class=soft>(<span style="color:var(--bar)">captions</span>, '
            '<span style="color:var(--other)">rewrites</span>)</span></h2>',
            _lengths(pairs),
        ]
    measured = [entry for entry in rewrites + rejects if "similarity" in entry]
    if measured:
        parts += ["<h2>Similarity in meaning</h2>", _similarity(measured, job)]
    if rewrites:
        parts += ["<h2>Samples</h2>"]
        parts += [_samples(rewrites, ("source", "text"), ("Caption", "Rewrite"))]
    if rejects:
        columns = ("source", "text", "reason"), ("Caption", "Answer", "Reason")
        parts += ["<h2>Samples of what was rejected</h2>", _samples(rejects, *columns)]
    page = folder / "report.html"
    with whole_file(page) as file:
        file.write(("\n".join(parts) + "\n").encode(errors="replace"))
    return page


def overlap(source: str, text: str) -> float:
    """Share of the different words of both texts that stand in both (Jaccard)."""
    first, second = set(_words(source)), set(_words(text))
    return len(first & second) / max(len(first | second), 1)


def distinct(texts: Iterable[str], size: int) -> float:
    """Different n-grams of `size` words for each one that there is."""
    grams: Counter = Counter()
    for text in texts:
        words = _words(text)
        grams.update(zip(*(words[i:] for i in range(size)), strict=False))
    return len(grams) / max(grams.total(), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _read(folder: Path, finished: list[dict]) -> list[dict]:
    """Entries of shards spread over the run, the same each time."""
    chosen = finished[:: max(1, len(finished) // 50)]
    share = max(1, MEASURED // max(len(chosen), 1))
    entries: list[dict] = []
    for shard in chosen:
        for count, (entry, _) in enumerate(read_lines(folder / f"{shard['shard']}.jsonl")):
            if count == share:
                break
            entries.append(entry)
    return entries


def _reasons(finished: list[dict], captions: int) -> str:
    rows = []
    for reason, meaning in REASONS.items():
        count = sum(entry["rejected"].get(reason, 0) for entry in finished)
        if count:
            share = count / captions
            rows.append(
                f"<tr><td>{reason}<td class=left>{html.escape(meaning)}<td>{count:,}<td>{share:.2%}"
            )
    if not rows:
        return "<p>Nothing.</p>"
    head = "<tr><th>Reason<th class=left>Meaning<th>Captions<th>Share"
    return f"<table>{head}{''.join(rows)}</table>"


def _figures(pairs: list[tuple[str, str]]) -> str:
    sides = [[source for source, _ in pairs], [text for _, text in pairs]]
    both = [text for side in sides for text in side]
    rows = []
    for name, texts in (("captions", sides[0]), ("rewrites", sides[1]), ("both", both)):
        words = [_words(text) for text in texts]
        count = sum(map(len, words))
        vocabulary = len({word for text in words for word in text})
        cells = [f"{count / len(texts):.1f}", f"{vocabulary:,}"]
        cells += [f"{distinct(texts, size):.3f}" for size in (1, 2, 3)]
        rows.append(f"<tr><td>{name}" + "".join(f"<td>{cell}" for cell in cells))
    mean = sum(overlap(*pair) for pair in pairs) / len(pairs)
    return (
        "<table><tr><th>Texts<th>Words a text<th>Vocabulary<th>Distinct words<th>Distinct pairs"
        f"<th>Distinct triples{''.join(rows)}</table><p>Words that a caption and its rewrite "
        f"share, of all words of the two: {mean:.1%} on average. Distinct: "
        "different words, pairs or triples for each one that there is.</p>"
    )


def _lengths(pairs: list[tuple[str, str]]) -> str:
    edges = (1, 3, 5, 8, 12, 17, 25, 40)
    rows = []
    for low, high in zip(edges, (*edges[1:], 10**9), strict=True):
        shares = [
            sum(low <= len(_words(pair[side])) < high for pair in pairs) / len(pairs)
            for side in (0, 1)
        ]
        rows.append(_bars(f"{low} to {high - 1}" if high < 10**9 else f"{low} and more", shares))
    return f"<table><tr><th>Words<th><th>Captions<th>Rewrites{''.join(rows)}</table>"


def _similarity(entries: list[dict], job: dict) -> str:
    """Mean, distribution and the farthest of what an encoder measured."""
    ordered = sorted(entries, key=lambda entry: entry["similarity"])
    values = [entry["similarity"] for entry in ordered]
    tenths = Counter(min(int(value * 10 // 1), 9) for value in values)
    bars = [
        _bars(f"{i / 10:.1f} to {i / 10 + 0.1:.1f}", [tenths[i] / len(values)])
        for i in range(min(tenths), 10)
    ]
    low, middle, high = (values[int(share * (len(values) - 1))] for share in (0.05, 0.5, 0.95))
    told = f"Cosine by {Path(job['encoder']).name} of all answers, rejected ones too: "
    told += f"mean {sum(values) / len(values):.3f}, median {middle:.3f}; nine in ten lie between "
    told += f"{low:.3f} and {high:.3f}."
    if job["min_similarity"] is not None:
        told += f" Below {job['min_similarity']} they are rejected."
    rows = [
        f"<tr><td class=left>{html.escape(entry['source'][:400])}"
        f"<td class=left>{html.escape(entry['text'][:400])}<td>{entry.get('reason', '')}"
        f"<td>{entry['similarity']:.3f}"
        for entry in ordered[: min(FARTHEST, max(5, len(ordered) // 10))]
    ]
    head = "<tr><th>Farthest captions<th class=left>Answers<th>Reason<th>Similarity"
    return (
        f"<p>{html.escape(told)}</p><table><tr><th>Cosine<th><th>Answers{''.join(bars)}</table>"
        f"<table>{head}{''.join(rows)}</table>"
    )


def _bars(name: str, shares: list[float]) -> str:
    bars = "".join(
        f'<div class="bar{kind}" style="width:{share:.1%}"></div>'
        for share, kind in zip(shares, ("", " other"), strict=False)
    )
    return f"<tr><td>{name}<td class=wide>{bars}" + "".join(f"<td>{x:.1%}" for x in shares)


def _samples(entries: list[dict], fields: tuple, names: tuple) -> str:
    """The same at random each time: those whose numbers are the smallest."""
    numbered = ((_native.philox([i, 0, 0, 0], 0, 0)[0], i) for i in range(len(entries)))
    chosen = [entries[i] for _, i in sorted(numbered)[:SHOWN]]
    rows = [
        "<tr>" + "".join(f"<td class=left>{html.escape(entry[field][:400])}" for field in fields)
        for entry in chosen
    ]
    head = "".join(f"<th class=left>{name}" for name in names)
    return f"<table><tr>{head}{''.join(rows)}</table>"
