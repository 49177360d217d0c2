"""Where texts come from: JSONL, CSV and Parquet by key, and the LaCLIP release's text files.

Every reader yields (identity, text): what a sample is found by, and its rewrite. The identity is
the key, the row number, the image path or the exact caption.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

PATH_COLUMNS = ("path", "filepath", "image_path", "image", "filename", "url")
CAPTION_COLUMNS = ("caption", "title", "text")
csv.field_size_limit(1 << 27)


def read_rewrites(
    path: Path, original_csv: Path | None = None, join: str = "row"
) -> Iterator[tuple[str, str]]:
    """(identity, text) of a file of rewrites.

    .jsonl (lines {"key": ..., "text": ...}), .csv and .parquet (columns key and text) by key; any
    other file is a text of the LaCLIP release, line by line with `original_csv`, whose rows are
    found by `join`: "row", "path" or "caption". Raises ValueError with file and line for what
    cannot be read or does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of rewrites")
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif path.suffix == ".csv":
        yield from _read_keyed_csv(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif original_csv is None:
        raise ValueError(
            f"{path}: neither .jsonl, .csv nor .parquet. For a text file of the LaCLIP release, "
            "line by line, name its original as well: --original-csv FILE"
        )
    else:
        yield from _read_release(path, original_csv, join)


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
    """(line where it ends, cells) of every record; quoted cells may hold commas and newlines."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such CSV file")
    reader = csv.reader((line + "\n" for line in read_lines(path)), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}") from None


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(image path, caption) of every row of a CSV such as the LaCLIP release's *_original.csv.

    A first row that names a path column and a caption column is a header; without one the first
    cell is the path and the second the caption.
    """
    columns = None
    for line, row in read_csv_rows(path):
        if columns is None:
            columns = _pair_columns(row)
            if columns is not None:
                continue
            columns = 0, 1
        if len(row) <= max(columns):
            raise ValueError(
                f"{path}: line {line}: {len(row)} cells, expected an image path and a caption"
            )
        cell = row[columns[1]].removesuffix("\n")
        yield row[columns[0]], cell


def _pair_columns(row: list[str]) -> tuple[int, int] | None:
    names = [cell.strip().lower() for cell in row]
    paths = [names.index(name) for name in PATH_COLUMNS if name in names]
    captions = [names.index(name) for name in CAPTION_COLUMNS if name in names]
    return (paths[0], captions[0]) if paths and captions else None


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            key, text = entry["key"], entry["text"]
        except (ValueError, KeyError, TypeError):
            key = text = None
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(
                f'{path}: line {number}: found {line[:80]!r}, expected {{"key": "...", '
                '"text": "..."}'
            )
        yield key, text


def _read_keyed_csv(path: Path) -> Iterator[tuple[str, str]]:
    columns = None
    for line, row in read_csv_rows(path):
        if columns is None:
            names = [cell.strip().lower() for cell in row]
            if "key" not in names or "text" not in names:
                raise ValueError(
                    f"{path}: columns {row[:8]}, expected key and text in the first row"
                )
            columns = names.index("key"), names.index("text")
            continue
        if len(row) <= max(columns):
            raise ValueError(f"{path}: line {line}: {len(row)} cells, expected key and text")
        yield row[columns[0]], row[columns[1]]


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not Parquet ({error})") from None
    with file:
        names = file.schema_arrow.names
        if "key" not in names or "text" not in names:
            raise ValueError(f"{path}: columns {names[:8]}, expected key and text")
        for batch in file.iter_batches(columns=["key", "text"]):
            for key, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if key is not None and text is not None:
                    yield str(key), str(text)


def _read_release(path: Path, original_csv: Path, join: str) -> Iterator[tuple[str, str]]:
    lines = read_lines(path)
    count = 0
    for row, (image, caption) in enumerate(read_pairs(original_csv)):
        text = next(lines, None)
        if text is None:
            rows = sum(1 for _ in read_pairs(original_csv))
            raise ValueError(_line_counts(path, count, original_csv, rows))
        count += 1
        yield {"row": str(row), "path": image, "caption": caption}[join], text
    more = sum(1 for _ in lines)
    if more:
        raise ValueError(_line_counts(path, count + more, original_csv, count))


def _line_counts(path: Path, lines: int, original_csv: Path, rows: int) -> str:
    return (
        f"{path}: {lines} lines, but {original_csv} has {rows} rows: line n must be the rewrite of "
        "row n, so every later rewrite would go to a wrong image. Get both files whole"
    )
