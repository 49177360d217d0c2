"""Opening and reading a dataset: a folder with dataset.json and, for every tar, two sidecars.

The bytes of the sidecars are described in docs/format.md and csrc/sidecar.hpp; the batch reader in
C++ maps the same files. Opening reads dataset.json alone, whatever the number of shards.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from laclip import _native

if TYPE_CHECKING:
    from laclip.config import DataConfig

FORMAT = "laclip-dataset"
VERSION = 1  # of dataset.json and of both sidecars

# SampleRecord.flags
BAD, PROGRESSIVE, GRAYSCALE, CMYK, ALPHA, SIXTEEN_BIT, DECODED = 1, 2, 4, 8, 16, 32, 64
# Entries of a caption table
CAPTION_MISSING, CAPTION_SHORT, POSITION_MASK = 1 << 31, 1 << 30, (1 << 30) - 1
NO_ROW = 0xFFFFFFFF

FORMATS = ("unknown", "jpeg", "png", "webp")
# SampleRecord.reason: why a sample is bad.
REASONS = (
    "not bad",
    "no image",
    "image kind is not JPEG, PNG or WebP",
    "image of zero bytes",
    "broken image header",
    "image too large",
    "no caption",
    "key occurs earlier in the shard",
    "does not decode",
)

SAMPLES_MAGIC, CAPTIONS_MAGIC = b"LACLIPSM", b"LACLIPCP"
SAMPLES_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("count", "<u8"),
        ("shard_bytes", "<u8"),
        ("shard_checksum", "<u8"),
        ("keys_bytes", "<u8"),
        ("rules", "<u8"),
        ("checksum", "<u8"),
    ]
)
SAMPLE_RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("row", "<u4"),
        ("flags", "<u2"),
        ("format", "u1"),
        ("orientation", "u1"),
        ("reason", "<u4"),
    ]
)
CAPTIONS_HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("count", "<u8"),
        ("variants", "<u4"),
        ("token_bytes", "<u4"),
        ("tokens", "<u8"),
        ("samples_checksum", "<u8"),
        ("tokenizer", "S64"),
        ("reserved", "<u8"),
        ("checksum", "<u8"),
    ]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One line of dataset.json: a tar, how many samples it holds, and its sidecars' checksums."""

    name: str
    samples: int
    bad: int
    samples_checksum: str
    captions_checksum: str | None

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")


class SamplesTable:
    """A mapped .samples file: `records`, a structured array [count], and the keys."""

    def __init__(self, path: Path):
        self.path = path
        data, self.header = map_sidecar(path, SAMPLES_HEADER, SAMPLES_MAGIC, "laclip index")
        self.checksum = as_hex(self.header["checksum"])
        count, keys = int(self.header["count"]), int(self.header["keys_bytes"])
        keys_at = 64 + 36 * count
        _check_size(path, len(data), keys_at + keys, "laclip index")
        self.records = data[64 : 64 + 32 * count].view(SAMPLE_RECORD)
        self._key_end = data[64 + 32 * count : keys_at].view("<u4")
        self._keys = data[keys_at:]

    def __len__(self) -> int:
        return len(self.records)

    def key(self, index: int) -> str:
        """The key of a sample: the name of its members in the tar, up to the first dot."""
        begin = int(self._key_end[index - 1]) if index else 0
        return self._keys[begin : int(self._key_end[index])].tobytes().decode()

    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        text, ends = self._keys.tobytes(), self._key_end.tolist()
        return [text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]

    def key_hashes(self) -> np.ndarray:
        """XXH64 of every key, uint64 [count]."""
        return _native.hash_slices(self._keys, self._key_end)


class CaptionsTable:
    """A mapped .captions file: the tokens of every variant of every sample."""

    def __init__(self, path: Path):
        self.path = path
        data, self.header = map_sidecar(path, CAPTIONS_HEADER, CAPTIONS_MAGIC, "laclip tokenize")
        self.checksum = as_hex(self.header["checksum"])
        self.samples_checksum = as_hex(self.header["samples_checksum"])
        self.count, self.variants = int(self.header["count"]), int(self.header["variants"])
        width, tokens = int(self.header["token_bytes"]), int(self.header["tokens"])
        if width not in (2, 4):
            raise ValueError(f"{path}: tokens of {width} bytes, expected 2 or 4. {_REBUILD}")
        tokens_at = 128 + 4 * (self.count * self.variants + 1)
        _check_size(path, len(data), tokens_at + width * tokens, "laclip tokenize")
        self.entries = data[128:tokens_at].view("<u4")
        self.all_tokens = data[tokens_at:].view("<u2" if width == 2 else "<u4")

    def __len__(self) -> int:
        return self.count

    def _entry(self, index: int, variant: int) -> int:
        if not (0 <= index < self.count and 0 <= variant < self.variants):
            raise IndexError(
                f"{self.path}: caption ({index}, {variant}) of {self.count} x {self.variants}"
            )
        return index * self.variants + variant

    def tokens(self, index: int, variant: int) -> np.ndarray:
        """Token ids of one caption, without start and end of text: a view into the file."""
        entry = self._entry(index, variant)
        begin, end = (self.entries[entry : entry + 2] & POSITION_MASK).tolist()
        return self.all_tokens[begin:end]

    def flags(self, index: int, variant: int) -> int:
        """CAPTION_MISSING and CAPTION_SHORT bits of one caption."""
        return int(self.entries[self._entry(index, variant)]) & ~POSITION_MASK

    @property
    def tokenizer(self) -> str:
        return self.header["tokenizer"].decode()


_REBUILD = "The file is of another kind or broken. Run: laclip verify"


def map_sidecar(path: Path, header_type: np.dtype, magic: bytes, command: str):
    """A sidecar as a mapped uint8 array and its header, after the checks that cost nothing."""
    folder = path.parent
    try:
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing. Run: {command} {folder}") from None
    except ValueError:  # an empty file cannot be mapped
        data = np.zeros(0, np.uint8)
    if len(data) < header_type.itemsize:
        raise ValueError(
            f"{path}: {len(data)} bytes, shorter than its header of {header_type.itemsize}. "
            f"Run: {command} {folder}"
        )
    header = data[: header_type.itemsize].view(header_type)[0]
    if header["magic"] != magic:
        raise ValueError(
            f"{path}: begins with {bytes(header['magic'])!r}, expected {magic!r}. "
            f"Run: {command} {folder}"
        )
    if header["version"] != VERSION or header["header_bytes"] != header_type.itemsize:
        raise ValueError(
            f"{path}: version {header['version']} with a header of {header['header_bytes']} bytes, "
            f"this laclip reads version {VERSION} with {header_type.itemsize}. "
            f"Run: {command} {folder}"
        )
    return data, header


def _check_size(path: Path, found: int, expected: int, command: str) -> None:
    if found != expected:
        raise ValueError(
            f"{path}: {found} bytes, its header announces {expected}. Run: {command} {path.parent}"
        )


class Dataset:
    """A dataset that was indexed, and tokenized where `variants` is not empty."""

    def __init__(self, path: Path, manifest: dict):
        self.path = path
        self.variants: tuple[str, ...] = tuple(manifest["variants"])
        self.tokenizer: str | None = manifest["tokenizer"]
        self.shards = [
            Shard(s["name"], s["samples"], s["bad"], s["samples_checksum"], s["captions_checksum"])
            for s in manifest["shards"]
        ]
        self.num_samples = sum(shard.samples for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """XXH64 in hex of what training sees: version, variants, tokenizer and every shard."""
        shards = [
            [s.name, s.samples, s.bad, s.samples_checksum, s.captions_checksum] for s in self.shards
        ]
        seen = json.dumps([VERSION, self.variants, self.tokenizer, shards], ensure_ascii=True)
        return checksum_hex(seen.encode())

    def tar_path(self, shard: int) -> Path:
        return self.path / self.shards[shard].name

    def samples(self, shard: int) -> SamplesTable:
        """The mapped .samples file of a shard. Raises ValueError if it is not the recorded one."""
        entry = self.shards[shard]
        table = SamplesTable(self.path / f"{entry.stem}.samples")
        self._check_same(table, entry.samples_checksum, entry.samples, "laclip index")
        return table

    def captions(self, shard: int) -> CaptionsTable:
        """The mapped .captions file of a shard. Raises ValueError if it is not the recorded one."""
        entry = self.shards[shard]
        if not self.variants or entry.captions_checksum is None:
            raise ValueError(f"{self.path}: not tokenized yet. Run: laclip tokenize {self.path}")
        table = CaptionsTable(self.path / f"{entry.stem}.captions")
        self._check_same(table, entry.captions_checksum, entry.samples, "laclip tokenize")
        if table.samples_checksum != entry.samples_checksum:
            raise ValueError(
                f"{table.path}: made for samples {table.samples_checksum}, the shard's are "
                f"{entry.samples_checksum}. Run: laclip tokenize {self.path}"
            )
        if table.variants != len(self.variants) or table.tokenizer != self.tokenizer:
            raise ValueError(
                f"{table.path}: {table.variants} variants by tokenizer {table.tokenizer}, "
                f"dataset.json says {len(self.variants)} by {self.tokenizer}. "
                f"Run: laclip tokenize {self.path}"
            )
        return table

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises ValueError unless the captions are in the ids of the tokenizer of that name."""
        if not self.variants:
            raise ValueError(f"'{self.path}' has no captions yet. Run: laclip tokenize {self.path}")
        if self.tokenizer != fingerprint:
            raise ValueError(
                f"'{self.path}/dataset.json' was tokenized with {self.tokenizer}, the model "
                f"expects {fingerprint}. Run: laclip tokenize {self.path}, or change data.tokenizer"
            )

    def _check_same(self, table, checksum: str, count: int, command: str) -> None:
        if table.checksum != checksum or len(table) != count:
            raise ValueError(
                f"{table.path}: {len(table)} samples, checksum {table.checksum}; dataset.json "
                f"records {count} and {checksum}. Run: {command} {self.path}"
            )


def as_hex(checksum: int) -> str:
    """A checksum as dataset.json has it."""
    return f"{checksum:016x}"


def checksum_hex(data: bytes) -> str:
    """XXH64 of bytes, in hex."""
    return as_hex(_native.xxh64(np.frombuffer(data, np.uint8)))


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset by its folder or its dataset.json; no other file is read.

    Raises FileNotFoundError where there is no dataset.json, ValueError where it is not one that
    this version reads.
    """
    path = Path(path)
    file = path if path.name == "dataset.json" else path / "dataset.json"
    if not file.is_file():
        if file.parent.is_dir():
            raise FileNotFoundError(f"{file} is missing. Run: laclip index {file.parent}")
        raise FileNotFoundError(f"{file.parent}: no such folder; expected a dataset's")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}). Run: laclip index {file.parent}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{file}: format {found!r}, expected {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{file}: version {manifest.get('version')}, this laclip reads {VERSION}. "
            f"Run: laclip index {file.parent}"
        )
    try:
        return Dataset(file.parent, manifest)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: entry {error} is missing or of the wrong type. "
            f"Run: laclip index {file.parent}"
        ) from None


def check_datasets(datasets: list[Dataset], data: "DataConfig", tokenizer: str) -> None:
    """Raises ValueError where captions cannot be drawn from the datasets as `data` says.

    tokenizer: the fingerprint of the model's.
    """
    first = datasets[0]
    for dataset in datasets:
        dataset.check_tokenizer(tokenizer)
        if data.captions == "weights" and dataset.variants != first.variants:
            raise ValueError(
                f"data.weights: one a variant, but '{first.path}' has "
                f"{', '.join(first.variants)} and '{dataset.path}' "
                f"{', '.join(dataset.variants)}. Run laclip tokenize with them in one order"
            )
        if data.captions == "multi" and len(dataset.variants) != len(first.variants):
            raise ValueError(
                f"data.captions: 'multi' takes every variant, but '{first.path}' has "
                f"{len(first.variants)} and '{dataset.path}' {len(dataset.variants)}"
            )
    if data.captions == "weights" and len(data.weights) != len(first.variants):
        raise ValueError(
            f"data.weights: found {len(data.weights)}, '{first.path}' has {len(first.variants)} "
            f"variants: {', '.join(first.variants)}"
        )
