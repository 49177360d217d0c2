"""laclip tokenize: captions and rewrites into .captions files.

    laclip tokenize FOLDER --rewrites NAME=FILE.jsonl ...

Originals come from KEY.txt in the tars; tars are never written. Variants that the dataset has
already are kept, those named here are added or replaced.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import laclip
from laclip import _native
from laclip.dataset import (
    CAPTION_MISSING,
    CAPTION_SHORT,
    CAPTIONS_HEADER,
    POSITION_MASK,
    CaptionsTable,
    SamplesTable,
    checksum_hex,
    open_dataset,
)
from laclip.prepare.folder import (
    remove_leftovers,
    samples_summary,
    seal,
    temporary_name,
    write_manifest,
    write_whole,
)
from laclip.prepare.shards import add_run_arguments, in_order, run_shards
from laclip.prepare.sources import read_rewrites
from laclip.prepare.store import TextStore, build_store
from laclip.tokenizer import load_tokenizer

RULES = 1  # of turning texts into entries
MAX_TOKENS = 512  # kept of one caption: far beyond any context, so that none can bloat the store
MAX_BYTES = 1 << 16  # read of one caption in a tar
CONTEXT_TOKENS = 75  # a context of 77 holds so many; longer captions are counted in the report
BINS = (0, 1, 6, 11, 21, 41, 76)  # of the histogram of lengths
JOURNAL = ".tokenize.journal"  # what a run has done so far; gone once dataset.json is written


@dataclass(frozen=True)
class Source:
    """Where one variant comes from."""

    name: str
    kind: str  # "txt": KEY.txt | "json": a field of KEY.json | "store" | "keep": the old captions
    place: str = ""  # the field, or the folder of the store
    old: int = 0  # number of the variant in the old captions
    identity: str = "key"  # what a store is asked by: key | row | path | caption
    checksum: int = 0  # of a store's texts


@dataclass
class VariantCount:
    """What went into one variant."""

    missing: int = 0
    short: int = 0
    over_context: int = 0
    cut: int = 0
    not_utf8: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(BINS), np.int64))

    def add(self, other: "VariantCount") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="an indexed dataset")
    parser.add_argument(
        "--rewrites",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a variant and its texts: .jsonl, .csv or .parquet by key; json:FIELD for a field of "
        "KEY.json in the tars; or a text file of the LaCLIP release (with --original-csv)",
    )
    parser.add_argument(
        "--original-csv", type=Path, help="*_original.csv that the text files follow line by line"
    )
    parser.add_argument(
        "--join",
        choices=("row", "path", "caption"),
        default="row",
        help="how rows of --original-csv find samples: the row number or the image path that "
        "`laclip pack` recorded, or the exact caption (default: row)",
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave a variant out"
    )
    parser.add_argument("--tokenizer", default="clip", help="clip or sentencepiece:FILE")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    rewrites = {}
    for given in args.rewrites:
        name, equals, file = given.partition("=")
        if not equals or not name or not file:
            raise ValueError(f"--rewrites {given}: expected NAME=FILE")
        rewrites[name] = file
    print(
        tokenize(
            args.folder,
            rewrites,
            tokenizer=args.tokenizer,
            original_csv=args.original_csv,
            join=args.join,
            drop=tuple(args.drop),
            jobs=args.jobs,
            ray=args.ray,
        )
    )
    return 0


def tokenize(
    folder: str | Path,
    rewrites: dict[str, Any] | None = None,
    *,
    tokenizer: str = "clip",
    original_csv: Path | None = None,
    join: str = "row",
    drop: tuple[str, ...] = (),
    jobs: int = 1,
    ray: bool = False,
) -> str:
    """Write every shard's .captions file and dataset.json; returns a report as text.

    rewrites: variant -> file (see `sources.read_rewrites`) or "json:FIELD". Variants of the
    dataset that are neither named nor dropped are kept as they are. Raises ValueError or
    FileNotFoundError for what does not fit, before any file of the dataset is touched. A run that
    was cut off goes on where it stopped when it is started again with the same arguments.
    """
    rewrites = dict(rewrites or {})
    dataset = open_dataset(Path(folder).resolve() if ray else folder)
    folder = dataset.path
    if ray and tokenizer.startswith("sentencepiece:"):
        tokenizer = f"sentencepiece:{Path(tokenizer.removeprefix('sentencepiece:')).resolve()}"
    fingerprint = load_tokenizer(tokenizer).fingerprint
    for name in drop:
        if name not in dataset.variants or name == "original":
            raise ValueError(f"--drop {name}: the dataset has {list(dataset.variants)}")
    if "original" in rewrites:
        raise ValueError("--rewrites original=...: original is the name of KEY.txt in the tars")
    kept = [v for v in dataset.variants if v != "original" and v not in drop]
    if dataset.tokenizer not in (None, fingerprint) and set(kept) - set(rewrites):
        raise ValueError(
            f"{folder}: its variants {sorted(set(kept) - set(rewrites))} were tokenized with "
            f"{dataset.tokenizer}, asked for is {fingerprint}. Name their files again, or --drop"
        )
    remove_leftovers(folder)
    work = temporary_name(folder / "tokenize")
    work.mkdir()
    try:
        sources = _sources(dataset, kept, rewrites, original_csv, join, work, jobs)
        checksums, counts, used = _write_captions(
            dataset, sources, tokenizer, fingerprint, jobs, ray
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)
    variants = [source.name for source in sources]
    manifest_libraries = {"laclip": laclip.__version__}
    for library in ("ftfy", "regex", "sentencepiece"):
        manifest_libraries[library] = importlib.metadata.version(library)
    entries = [
        samples_summary(folder / f"{shard.stem}.samples")["shard"] for shard in dataset.shards
    ]
    if not write_manifest(folder, entries, checksums, variants, fingerprint, manifest_libraries):
        raise ValueError(
            f"{folder}: another process changed it meanwhile. Run laclip tokenize again"
        )
    (folder / JOURNAL).unlink(missing_ok=True)
    return _report(folder, dataset.num_samples, sources, counts, used)


def _sources(dataset, kept, rewrites, original_csv, join, work: Path, jobs: int) -> list[Source]:
    """The variants in their order; reads and checks every file of rewrites."""
    sources = [Source("original", "txt")]
    files = {}  # position in sources: arguments of _build
    for name in [*kept, *(name for name in rewrites if name not in kept)]:
        if name not in rewrites:
            sources.append(Source(name, "keep", old=dataset.variants.index(name)))
        elif str(rewrites[name]).startswith("json:"):
            sources.append(Source(name, "json", str(rewrites[name]).removeprefix("json:")))
        else:
            place = work / str(len(sources))
            files[len(sources)] = (place, Path(rewrites[name]), original_csv, join)
            by_key = Path(rewrites[name]).suffix in (".jsonl", ".csv", ".parquet")
            sources.append(Source(name, "store", str(place), 0, "key" if by_key else join))
    checksums = run_shards(
        _build,
        files.values(),
        total=len(files),
        label="read rewrites",
        unit="files",
        jobs=jobs,
        weigh=lambda result: (result[1], "texts"),
    )
    for number, (checksum, _) in zip(files, in_order(checksums), strict=True):
        sources[number] = replace(sources[number], checksum=checksum)
    return sources


def _build(place: Path, path: Path, original_csv: Path | None, join: str) -> tuple[int, int]:
    checksum, count = build_store(place, read_rewrites(path, original_csv, join))
    if count == 0:
        raise ValueError(f"{path}: no rewrites in it")
    return checksum, count


def _write_captions(dataset, sources, tokenizer, fingerprint, jobs, ray):
    """Run the shards that are left.

    Returns the checksum of each shard's file, and the counts and found texts of every variant.
    """
    seen = [(s.name, s.kind, s.old, s.identity, s.checksum) for s in sources]
    fields = [s.place for s in sources if s.kind == "json"]
    old = (
        [s.captions_checksum for s in dataset.shards]
        if any(s.kind == "keep" for s in sources)
        else []
    )
    plan = checksum_hex(json.dumps([RULES, MAX_TOKENS, fingerprint, seen, fields, old]).encode())
    done = _read_journal(dataset.path / JOURNAL, plan)
    tasks = [
        (dataset.path, shard, sources, tokenizer, plan, done.get(shard.name))
        for shard in dataset.shards
    ]
    results = run_shards(
        tokenize_shard,
        tasks,
        total=len(tasks),
        label="tokenize",
        jobs=jobs,
        ray=ray,
        weigh=lambda result: (result[3], "captions"),
    )
    counts = [VariantCount() for _ in sources]
    used: list[np.ndarray | None] = [
        np.zeros(len(TextStore(Path(s.place))), bool) if s.kind == "store" else None
        for s in sources
    ]
    checksums = {}
    for number, (checksum, shard_counts, found, _) in results:
        checksums[dataset.shards[number].name] = checksum
        for total, count in zip(counts, shard_counts, strict=True):
            total.add(count)
        for mask, numbers in zip(used, found, strict=True):
            if mask is not None:
                mask[numbers] = True
    return checksums, counts, used


def _read_journal(path: Path, plan: str) -> dict[str, str]:
    """Shard -> checksum of the captions that an earlier run of the same plan wrote for it."""
    if not path.exists():
        return {}
    lines = path.read_bytes().decode(errors="replace").splitlines()
    fields = [line.split("\t") for line in lines]
    return {f[1]: f[2] for f in fields if len(f) == 4 and f[0] == plan and f[3] == "."}


@functools.lru_cache(maxsize=1)
def _tokenizer(spec: str):
    return load_tokenizer(spec)


@functools.lru_cache(maxsize=64)
def _store(place: str) -> TextStore:
    return TextStore(Path(place))


def tokenize_shard(folder: Path, shard, sources, tokenizer: str, plan: str, done: str | None):
    """Write the .captions file of one shard.

    Returns the file's checksum; for every variant, its counts and the numbers of the texts that
    were used; and how many captions were written.
    """
    samples = SamplesTable(folder / f"{shard.stem}.samples")
    if f"{int(samples.header['checksum']):016x}" != shard.samples_checksum:
        raise ValueError(f"{samples.path}: not as dataset.json says. Run: laclip index {folder}")
    path = folder / f"{shard.stem}.captions"
    texts_of = _ShardTexts(folder / shard.name, samples)
    tokens_of: list[Any] = []
    counts, found = [], []
    old = None
    for source in sources:
        count = VariantCount()
        numbers = np.zeros(0, np.int64)
        if source.kind == "keep":
            if done is None or old is not None or not _has_checksum(path, done):
                old = old or _old_captions(path, shard)
                tokens_of.append(_kept(old, source.old))
            else:
                tokens_of.append(None)
        else:
            if source.kind == "store":
                texts, numbers = _store(source.place).find(texts_of.identities(source.identity))
            else:
                texts, count.not_utf8 = texts_of.read(source.kind, source.place)
            tokens_of.append(_encode(texts, tokenizer, count))
        counts.append(count)
        found.append(numbers)
    if done is None or not _has_checksum(path, done):
        done = _write(path, samples, tokens_of, _tokenizer(tokenizer), plan, shard.name)
    table = CaptionsTable(path)
    for variant, count in enumerate(counts):
        _count(table, variant, count)
    return done, counts, found, len(samples) * len(sources)


def _has_checksum(path: Path, checksum: str) -> bool:
    try:
        return f"{int(CaptionsTable(path).header['checksum']):016x}" == checksum
    except (FileNotFoundError, ValueError):
        return False


def _old_captions(path: Path, shard) -> CaptionsTable:
    table = CaptionsTable(path)
    if f"{int(table.header['checksum']):016x}" != shard.captions_checksum:
        raise ValueError(
            f"{path}: not as dataset.json says: another run of laclip tokenize stopped halfway. "
            "Finish it with its own arguments, or name the files of all variants again"
        )
    return table


def _kept(old: CaptionsTable, variant: int):
    """(lengths, tokens, flags) of one variant of existing captions."""
    begin = (old.entries[:-1] & POSITION_MASK).astype(np.int64)
    length = np.diff(old.entries & POSITION_MASK).astype(np.int64)
    chosen = slice(variant, None, old.variants)
    starts, lengths = begin[chosen], length[chosen]
    places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    return lengths, old.all_tokens[places], old.entries[:-1][chosen] & ~np.uint32(POSITION_MASK)


def _encode(texts: list[str | None], tokenizer: str, count: VariantCount):
    """(lengths, tokens, flags) of texts; None and blank ones are missing and empty."""
    flags = np.zeros(len(texts), np.uint32)
    cleaned = []
    for i, text in enumerate(texts):
        words = text.split(None, 1) if text else ()
        if not words:
            flags[i] = CAPTION_MISSING
        elif len(words) < 2:
            flags[i] = CAPTION_SHORT
        cleaned.append(text[:MAX_BYTES] if words and text else "")
    tokens, offsets = _tokenizer(tokenizer).encode_ragged(cleaned, max_tokens=MAX_TOKENS)
    lengths = np.diff(offsets).astype(np.int64)
    count.cut = int(np.count_nonzero(lengths == MAX_TOKENS))
    return lengths, tokens, flags


def _write(path: Path, samples: SamplesTable, tokens_of, tokenizer, plan: str, name: str) -> str:
    variants = len(tokens_of)
    lengths = np.column_stack([lengths for lengths, _, _ in tokens_of])  # [count, variants]
    flags = np.column_stack([flags for _, _, flags in tokens_of])
    token_bytes = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    total = int(lengths.sum())
    if total > POSITION_MASK:
        raise ValueError(
            f"{path}: {total} tokens, a shard holds at most {POSITION_MASK}. Use smaller shards"
        )
    entries = np.zeros(lengths.size + 1, np.uint32)
    ends = np.cumsum(lengths.ravel())
    entries[1:] = ends
    entries[:-1] |= flags.ravel()
    tokens = np.empty(total, "<u2" if token_bytes == 2 else "<u4")
    starts = (ends - lengths.ravel()).reshape(lengths.shape)
    for variant, (count, own, _) in enumerate(tokens_of):
        inside = np.arange(len(own)) - np.repeat(np.cumsum(count) - count, count)
        tokens[np.repeat(starts[:, variant], count) + inside] = own
    header = np.zeros((), CAPTIONS_HEADER)
    header["magic"], header["version"], header["header_bytes"] = b"LACLIPCP", 1, 128
    header["count"], header["variants"] = len(samples), variants
    header["token_bytes"], header["tokens"] = token_bytes, total
    header["samples_checksum"] = samples.header["checksum"]
    header["tokenizer"] = tokenizer.fingerprint.encode()
    sealed = seal(header, [entries.tobytes(), tokens.tobytes()])
    # Before the rename: then a run that dies between the two finds either file and knows it.
    checksum = f"{int(header['checksum']):016x}"
    with open(path.parent / JOURNAL, "ab") as journal:
        journal.write(f"{plan}\t{name}\t{checksum}\t.\n".encode())
    write_whole(path, sealed)
    return checksum


def _count(table: CaptionsTable, variant: int, count: VariantCount) -> None:
    entries = table.entries[variant : table.count * table.variants : table.variants]
    lengths = np.diff(table.entries & POSITION_MASK)[variant :: table.variants]
    count.missing = int(np.count_nonzero(entries & CAPTION_MISSING))
    count.short = int(np.count_nonzero(entries & CAPTION_SHORT))
    count.over_context = int(np.count_nonzero(lengths > CONTEXT_TOKENS))
    count.lengths = read_lengths(table, variant)


def read_lengths(table: CaptionsTable, variant: int) -> np.ndarray:
    """How many captions of a variant have so many tokens, int64 [len(BINS)]; missing ones apart."""
    entries = table.entries[variant : table.count * table.variants : table.variants]
    lengths = np.diff(table.entries & POSITION_MASK)[variant :: table.variants]
    present = lengths[entries & CAPTION_MISSING == 0]
    bins = np.searchsorted(BINS, present, side="right") - 1
    return np.bincount(bins, minlength=len(BINS)).astype(np.int64)


class _ShardTexts:
    """The texts that lie in a tar, by the samples' order; each kind is read once."""

    def __init__(self, tar: Path, samples: SamplesTable):
        self.tar, self.samples = tar, samples
        self.keys = samples.keys()
        self._members: dict[str, dict[str, bytes]] = {}

    def _member(self, extension: str) -> dict[str, bytes]:
        if extension not in self._members:
            found: dict[str, bytes] = {}
            for key, data in _native.read_tar_texts(str(self.tar), extension, MAX_BYTES):
                found.setdefault(key, data)
            self._members[extension] = found
        return self._members[extension]

    def read(self, kind: str, place: str) -> tuple[list[str | None], int]:
        """Texts of KEY.txt, or of a field of KEY.json, and how many were not UTF-8."""
        if kind == "json":
            return self._field(place), 0
        members = self._member("txt")
        texts: list[str | None] = []
        broken = 0
        for key in self.keys:
            data = members.get(key)
            if data is None:
                texts.append(None)
                continue
            text = data.decode(errors="replace")
            # A caption of MAX_BYTES was cut there, perhaps inside a character.
            broken += "�" in text[:-1] and "�".encode() not in data
            texts.append(text)
        return texts, broken

    def _field(self, name: str) -> list[str | None]:
        members = self._member("json")
        values: list[str | None] = []
        for key in self.keys:
            value = None
            if key in members:
                try:
                    value = json.loads(members[key]).get(name)
                except (ValueError, AttributeError):
                    raise ValueError(f"{self.tar}: {key}.json is not a JSON object") from None
            values.append(value if isinstance(value, str) else None)
        return values

    def identities(self, kind: str) -> list[str | None]:
        if kind == "key":
            return list(self.keys)
        if kind == "row":
            rows = self.samples.records["row"].tolist()
            return [str(row) if row != 0xFFFFFFFF else None for row in rows]
        if kind == "path":
            return self._field("laclip_path")
        return self.read("txt", "")[0]


def _report(folder: Path, samples: int, sources, counts, used) -> str:
    lines = [f"{folder}: {samples} samples x {len(sources)} variants"]
    head = ["variant", "missing", "short", f">{CONTEXT_TOKENS}", "not UTF-8", "unmatched"]
    labels = [f"{a}-{b - 1}" for a, b in itertools.pairwise(BINS[1:])]
    head += ["0", *labels, f"{BINS[-1]}+"]
    rows = [head]
    for source, count, mask in zip(sources, counts, used, strict=True):
        unmatched = "" if mask is None else str(int(np.count_nonzero(~mask)))
        numbers = [count.missing, count.short, count.over_context, count.not_utf8]
        rows.append([source.name, *map(str, numbers), unmatched, *map(str, count.lengths)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        lines.append("  " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))
    lines.append(
        "  (the last columns count captions by tokens; unmatched: rewrites that no sample took)"
    )
    return "\n".join(lines)
