"""One shard's captions: texts from the tar and from stores of rewrites into a .captions file."""

import functools
import itertools
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from laclip import _native
from laclip.dataset import (
    CAPTION_MISSING,
    CAPTION_SHORT,
    CAPTIONS_HEADER,
    CAPTIONS_MAGIC,
    NO_ROW,
    POSITION_MASK,
    CaptionsTable,
    SamplesTable,
    as_hex,
)
from laclip.prepare.folder import is_whole, seal, write_whole
from laclip.prepare.sources import squeeze
from laclip.prepare.store import TextStore
from laclip.tokenizer import load_tokenizer

MAX_TOKENS = 512  # kept of one caption: far beyond any context, so that none can bloat the store
MAX_BYTES = 1 << 16  # read of one caption in a tar
CONTEXT_TOKENS = 75  # a context of 77 holds so many; longer captions are counted in the report
BINS = (0, 1, 6, 11, 21, 41, 76)  # of the histogram of lengths
LENGTHS = ("0", *(f"{a}-{b - 1}" for a, b in itertools.pairwise(BINS[1:])), f"{BINS[-1]}+")
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
    """What went into one variant; lengths: captions by tokens, in BINS, missing ones apart."""

    missing: int = 0
    short: int = 0
    over_context: int = 0
    not_utf8: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(BINS), np.int64))

    def add(self, other: "VariantCount") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@functools.lru_cache(maxsize=1)
def _tokenizer(spec: str):
    return load_tokenizer(spec)


@functools.lru_cache(maxsize=64)
def _store(place: str) -> TextStore:
    return TextStore(Path(place))


def tokenize_shard(
    folder: Path, shard, sources, tokenizer: str, plan: str, done: tuple[str, int] | None
):
    """Write the .captions file of one shard, unless it is the one that `done` tells of.

    done: a checksum, and how many originals were not UTF-8. Returns the file's checksum; for every
    variant, its counts and the numbers of the texts that were used; and how many captions were
    written.
    """
    samples = SamplesTable(folder / f"{shard.stem}.samples")
    if samples.checksum != shard.samples_checksum:
        raise ValueError(f"{samples.path}: not as dataset.json says. Run: laclip index {folder}")
    if not is_whole(samples):  # another key would take another sample's rewrites
        raise ValueError(
            f"{samples.path}: its bytes do not give its checksum. "
            f"Run: laclip index --force {folder}"
        )
    size = (folder / shard.name).stat().st_size
    if size != samples.header["shard_bytes"]:
        raise ValueError(
            f"{folder / shard.name}: {size} bytes, {samples.header['shard_bytes']} when it was "
            f"indexed. Run: laclip index {folder}"
        )
    path = folder / f"{shard.stem}.captions"
    checksum, broken = done if done and _is_done(path, done[0], shard) else (None, 0)
    texts_of = ShardTexts(folder / shard.name, samples)
    tokens_of: list[Any] = []
    found = []
    old = None
    for source in sources:
        texts: list[str | None] = []
        numbers = np.zeros(0, np.int64)
        if source.kind == "store":
            texts, numbers = _store(source.place).find(texts_of.identities(source.identity))
        found.append(numbers)
        if checksum is not None:
            continue
        if source.kind == "keep":
            old = old or _old_captions(path, shard)
            tokens_of.append(_kept(old, source.old))
            continue
        if source.kind != "store":
            texts, not_utf8 = texts_of.read(source.kind, source.place)
            broken += not_utf8
        tokens_of.append(_encode(texts, tokenizer))
    written = 0
    if checksum is None:
        checksum = _write(path, samples, tokens_of, _tokenizer(tokenizer), plan, shard.name, broken)
        written = len(samples) * len(sources)
    table = CaptionsTable(path)
    counts = [count_captions(table, variant) for variant in range(len(sources))]
    counts[0].not_utf8 = broken  # KEY.txt alone may be so
    return checksum, counts, found, written


def has_texts(folder: Path, shard, source: Source) -> bool:
    """Whether a store, or a field of KEY.json, has a text for any sample of a shard."""
    texts_of = open_texts(folder, shard)
    if source.kind == "json":
        return any(texts_of.read("json", source.place)[0])
    return len(_store(source.place).find(texts_of.identities(source.identity))[1]) > 0


def _is_done(path: Path, checksum: str, shard) -> bool:
    """Whether a .captions file has this checksum, whole, and is made of a shard's samples."""
    try:
        table = CaptionsTable(path)
    except (FileNotFoundError, ValueError):
        return False
    found = table.checksum, table.samples_checksum
    return found == (checksum, shard.samples_checksum) and is_whole(table)


def _old_captions(path: Path, shard) -> CaptionsTable:
    again = (
        "Name the files of all variants again (--rewrites NAME=FILE; --drop NAME without a file)"
    )
    try:
        table = CaptionsTable(path)
    except (FileNotFoundError, ValueError):
        table = None
    if table is None or not is_whole(table):
        what = "is damaged" if path.exists() else "is missing"
        raise ValueError(
            f"{path} {what}: no variant can be kept from it. {again}, or put the file back"
        )
    if table.checksum != shard.captions_checksum:
        raise ValueError(
            f"{path}: not as dataset.json says: another run of laclip tokenize stopped halfway. "
            f"Finish it with its own arguments. Or: {again}"
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


def _encode(texts: list[str | None], tokenizer: str):
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
    return lengths, tokens, flags


def _write(
    path: Path, samples: SamplesTable, tokens_of, tokenizer, plan: str, name: str, broken: int
) -> str:
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
    header["magic"] = CAPTIONS_MAGIC
    header["count"], header["variants"] = len(samples), variants
    header["token_bytes"], header["tokens"] = token_bytes, total
    header["samples_checksum"] = samples.header["checksum"]
    header["tokenizer"] = tokenizer.fingerprint.encode()
    sealed = seal(header, [entries.tobytes(), tokens.tobytes()])
    # Before the rename: then a run that dies between the two finds either file and knows it.
    checksum = as_hex(int(header["checksum"]))
    line = f"\n{plan}\t{name}\t{checksum}\t{broken}\t.\n"  # \n: the last line may be torn
    with open(path.parent / JOURNAL, "ab") as journal:
        journal.write(line.encode())
        journal.flush()
        os.fsync(journal.fileno())
    write_whole(path, sealed)
    return checksum


def count_captions(table: CaptionsTable, variant: int) -> VariantCount:
    """What a .captions file holds of a variant."""
    entries = table.entries[variant : -1 : table.variants]
    lengths = np.diff(table.entries & POSITION_MASK)[variant :: table.variants]
    missing = entries & CAPTION_MISSING != 0
    bins = np.searchsorted(BINS, lengths[~missing], side="right") - 1
    return VariantCount(
        missing=int(np.count_nonzero(missing)),
        short=int(np.count_nonzero(entries & CAPTION_SHORT)),
        over_context=int(np.count_nonzero(lengths > CONTEXT_TOKENS)),
        lengths=np.bincount(bins, minlength=len(BINS)).astype(np.int64),
    )


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of a table as lines, every column set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]


class ShardTexts:
    """The texts that lie in a tar, by the samples' order; each kind is read once."""

    def __init__(self, tar: Path, samples: SamplesTable):
        self.tar, self.samples = tar, samples
        self.keys = samples.keys()
        self._members: dict[str, dict[str, bytes]] = {}

    def _member(self, extension: str) -> dict[str, bytes]:
        if extension not in self._members:
            found: dict[str, bytes] = {}
            most = MAX_BYTES if extension == "txt" else 1 << 40  # half a KEY.json is none
            for key, data in _native.read_tar_texts(str(self.tar), extension, most):
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
            seen = text[:-1] if len(data) == MAX_BYTES else text
            broken += "�" in seen and "�".encode() not in data
            texts.append(text)
        return texts, broken

    def _field(self, name: str) -> list[str | None]:
        members = self._member("json")
        values: list[str | None] = []
        for key in self.keys:
            value = None
            with suppress(ValueError, AttributeError):  # what is no JSON object has no fields
                value = json.loads(members.get(key, b"{}")).get(name)
            values.append(value if isinstance(value, str) else None)
        return values

    def identities(self, kind: str) -> list[str | None]:
        if kind == "key":
            return list(self.keys)
        if kind == "row":
            rows = self.samples.records["row"].tolist()
            return [str(row) if row != NO_ROW else None for row in rows]
        if kind == "path":
            return self._field("laclip_path")
        return [squeeze(text) or None if text else None for text in self.read("txt", "")[0]]


def open_texts(folder: Path, shard) -> ShardTexts:
    """The texts of a shard of dataset.json."""
    return ShardTexts(folder / shard.name, SamplesTable(folder / f"{shard.stem}.samples"))
