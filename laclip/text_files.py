"""Lines of text files, and texts by key from JSONL, CSV (or tabs for commas) and Parquet."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

csv.field_size_limit(1 << 27)
# Half of a character, as JSON's escapes may bring it: no tokenizer or file takes it.
_HALF = re.compile("[\ud800-\udfff]")
_Row = tuple[int, Any, Any]  # number from 0, key or None, text or None


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text, without their ends. Only \\n and \\r\\n end a line."""
    at = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: line {number}, byte {at + error.start}: not UTF-8. If it is Latin-1: "
                    f"iconv -f latin1 -t utf8 {path.name} > NEW"
                ) from None
            at += len(line)
            if number == 1:
                text = text.removeprefix("\ufeff")  # as spreadsheets write it
            yield text.removesuffix("\n").removesuffix("\r")


def read_csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line where it ends, cells) of every record; quoted cells may hold commas and newlines.

    Cells end at commas; at tabs in a .tsv, and where the first line has a tab before any comma, as
    open_clip's lists. Raises ValueError for a row of more or fewer cells than the first: a text
    would be cut there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such CSV file")
    first = next(read_lines(path), "")
    tabs = path.suffix == ".tsv" or "\t" in first.partition(",")[0]
    end = "\t" if tabs else ","
    reader = csv.reader((line + "\n" for line in read_lines(path)), delimiter=end, strict=True)
    cells = 0
    try:
        for row in reader:
            if not row:
                continue
            cells = cells or len(row)
            if len(row) != cells:
                raise ValueError(
                    f"{path}: line {reader.line_num}: {len(row)} cells, its first row has {cells}. "
                    f"A text with {'tabs' if tabs else 'commas'} needs quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num}: {error}. A text that begins with a quotation mark "
            "needs quotes around it, and its own doubled"
        ) from None


def read_keyed(
    path: Path, text_names: tuple[str, ...], *, key_needed: bool
) -> Iterator[tuple[str, str]]:
    """(key, text) of every row of a .jsonl, .csv or .parquet file.

    Fields and columns are `key` and the first of text_names that is there. Unless key_needed, a
    row without a key gets its number, from 0. Nulls are passed over. Raises ValueError
    with file and line for what is unfit.
    """
    rows = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    for number, key, text in rows(path, text_names, key_needed):
        if text is not None and not (key is None and key_needed):
            yield str(number if key is None else key), str(text)


def open_parquet(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from None


def read_columns(path: Path, file: Any, columns: list[str]) -> Iterator[list[list[str | None]]]:
    """The values of a Parquet file's columns of strings, or of bytes that are UTF-8, in parts.

    Raises ValueError for columns of other kinds: str() would make texts of lists, and keys without
    their zeros of numbers.
    """
    for column in columns:
        kind = file.schema_arrow.field(column).type
        value = kind.value_type if str(kind).startswith("dictionary") else kind
        name = str(value).removeprefix("large_").removesuffix("_view")
        if name not in ("string", "binary", "null"):
            raise ValueError(f"{path}: column {column!r} holds {kind}, expected strings")
    first = 0
    for batch in file.iter_batches(columns=columns):
        yield [_strings(path, name, batch.column(name), first) for name in columns]
        first += len(batch)


def _strings(path: Path, name: str, column: Any, first: int) -> list[str | None]:
    values = column.cast("large_binary").to_pylist()  # Arrow takes any bytes for a string
    try:
        for row, value in enumerate(values):
            values[row] = None if value is None else value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: row {first + row}: its {name!r} is not UTF-8") from None
    return values


def _json_rows(path: Path, text_names: tuple[str, ...], key_needed: bool) -> Iterator[_Row]:
    for number, line in enumerate(read_lines(path)):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text = next(entry[name] for name in text_names if name in entry)
            key = entry["key"] if key_needed else entry.get("key", str(number))
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            key = text = None
        if not isinstance(key, str) or not isinstance(text, str | None):
            raise ValueError(
                f'{path}: line {number + 1}: found {line[:80]!r}, expected {{"key": "...", '
                f'"{text_names[0]}": "..."}}'
            )
        yield number, _HALF.sub("\ufffd", key), text and _HALF.sub("\ufffd", text)


def _csv_rows(path: Path, text_names: tuple[str, ...], key_needed: bool) -> Iterator[_Row]:
    columns = None
    for number, (_, row) in enumerate(read_csv_rows(path), -1):
        if columns is None:
            columns = _columns(path, row, text_names, key_needed)
            continue
        key_column, text_column = columns
        key = row[key_column] if key_column >= 0 else None
        yield number, key, row[text_column].removesuffix("\n")


def _parquet_rows(path: Path, text_names: tuple[str, ...], key_needed: bool) -> Iterator[_Row]:
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        key_column, text_column = _columns(path, names, text_names, key_needed)
        number = 0
        columns = [names[i] for i in (text_column, key_column) if i >= 0]
        for texts, *keys in read_columns(path, file, columns):
            for key, text in zip(keys[0] if keys else [None] * len(texts), texts, strict=True):
                yield number, key, text
                number += 1


def _columns(
    path: Path, names: list[str], text_names: tuple[str, ...], key_needed: bool
) -> tuple[int, int]:
    """Where key (-1: nowhere) and text stand."""
    lower = [name.strip().lower() for name in names]
    texts = [lower.index(name) for name in text_names if name in lower]
    if not texts or (key_needed and "key" not in lower):
        wanted = text_names[0] if len(text_names) == 1 else f"one of {', '.join(text_names)}"
        wanted = f"key and {wanted}" if key_needed else f"{wanted} and perhaps key"
        raise ValueError(f"{path}: columns {names[:8]}, expected {wanted}")
    return (lower.index("key") if "key" in lower else -1), texts[0]
