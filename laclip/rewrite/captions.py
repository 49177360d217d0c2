"""Captions to rewrite, shard by shard: a laclip dataset, tars, CSV, Parquet, JSONL, text lines."""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from laclip import _native
from laclip.dataset import checksum_hex, open_dataset

KINDS = (".tar", ".jsonl", ".csv", ".parquet", ".txt")
TEXT_NAMES = ("caption", "title", "text")
MAX_BYTES = 1 << 16  # read of one caption in a tar, as `laclip tokenize` does
_HALF = re.compile("[\ud800-\udfff]")
csv.field_size_limit(1 << 27)


@dataclass(frozen=True)
class CaptionShard:
    """One file of captions."""

    path: Path
    count: int | None = None  # of captions at most, where it is known

    @property
    def name(self) -> str:
        return self.path.stem

    def read(self) -> Iterator[tuple[str, str]]:
        """(key, caption) in the file's order; raises ValueError naming the line that is unfit.

        A tar gives KEY.txt by KEY. JSONL, CSV and Parquet give a field or column key (where there
        is none, the row's number from 0) and the first of caption, title and text. A text gives
        its lines by their number from 0.
        """
        return _READERS[self.path.suffix](self.path)


def open_captions(path: str | Path) -> list[CaptionShard]:
    """The shards of a dataset's folder, of a folder with files of one kind, or of one file."""
    path = Path(path)
    if path.name == "dataset.json":
        path = path.parent
    if (path / "dataset.json").is_file():
        dataset = open_dataset(path)
        return [CaptionShard(path / shard.name, shard.samples) for shard in dataset.shards]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in KINDS)
        kinds = sorted({file.suffix for file in files})
        if len(kinds) != 1:
            found = f"files of {len(kinds)} kinds ({', '.join(kinds)})" if kinds else "none"
            raise ValueError(f"{path}: {found}, expected files of one kind of {', '.join(KINDS)}")
        return [_shard(file) for file in files]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder of captions")
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: expected a dataset's folder or a file {', '.join(KINDS)}")
    return [_shard(path)]


def fingerprint(shards: list[CaptionShard]) -> str:
    """Tells whether the files are those of an earlier run: their names and sizes."""
    sizes = [(shard.path.name, shard.path.stat().st_size) for shard in shards]
    return checksum_hex(json.dumps(sizes).encode())


def _shard(path: Path) -> CaptionShard:
    """With its number of captions where that costs no reading of the whole file."""
    if path.suffix == ".parquet":
        with suppress(ValueError), _open_parquet(path) as file:  # told when the shard's turn comes
            return CaptionShard(path, file.metadata.num_rows)
    elif path.suffix != ".tar" and path.stat().st_size < 1 << 28:
        return CaptionShard(path, path.read_bytes().count(b"\n"))
    return CaptionShard(path)


def _read_tar(path: Path) -> Iterator[tuple[str, str]]:
    for key, data in _native.read_tar_texts(str(path), "txt", MAX_BYTES):
        yield key, data.decode(errors="replace")


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                yield str(number), line.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path}: line {number + 1}: not UTF-8. If it is Latin-1: "
                    f"iconv -f latin1 -t utf8 {path.name} > NEW"
                ) from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _read_text(path):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = next(entry[name] for name in TEXT_NAMES if name in entry)
            key = entry.get("key", number)
        except (ValueError, TypeError, AttributeError, StopIteration):
            key = text = None
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(
                f'{path}: line {int(number) + 1}: found {line[:80]!r}, expected {{"key": "...", '
                '"caption": "..."}'
            )
        # JSON's escapes may bring half of a character, which no tokenizer or file takes.
        yield _HALF.sub("\ufffd", key), _HALF.sub("\ufffd", text)


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    rows = csv.reader((line + "\n" for _, line in _read_text(path)), strict=True)
    columns = None
    number = 0
    try:
        for row in rows:
            if not row:
                continue
            if columns is None:
                columns = _columns(path, row)
                continue
            key_column, text_column = columns
            if len(row) <= max(columns):
                raise ValueError(
                    f"{path}: line {rows.line_num}: {len(row)} cells, fewer than its first row"
                )
            key = row[key_column] if key_column >= 0 else str(number)
            yield key, row[text_column].removesuffix("\n")
            number += 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num}: {error}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    with _open_parquet(path) as file:
        key_column, text_column = _columns(path, file.schema_arrow.names)
        names = [file.schema_arrow.names[i] for i in (text_column, key_column) if i >= 0]
        number = 0
        for batch in file.iter_batches(columns=names):
            texts = batch.column(names[0]).to_pylist()
            keys = batch.column(names[1]).to_pylist() if key_column >= 0 else [None] * len(texts)
            for key, text in zip(keys, texts, strict=True):
                if text is not None:
                    yield str(number if key is None else key), str(text)
                number += 1


def _columns(path: Path, names: list[str]) -> tuple[int, int]:
    """Where key (-1: nowhere) and caption stand."""
    lower = [name.strip().lower() for name in names]
    texts = [lower.index(name) for name in TEXT_NAMES if name in lower]
    if not texts:
        raise ValueError(
            f"{path}: columns {names[:8]}, expected one of {', '.join(TEXT_NAMES)} and perhaps key"
        )
    return (lower.index("key") if "key" in lower else -1), texts[0]


def _open_parquet(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from None


_READERS = {
    ".tar": _read_tar,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
