"""Where texts come from: JSONL, CSV and Parquet by key, and the LaCLIP release's text files.

Every reader yields (identity, text): what a sample is found by, and its rewrite. The identity is
the key, the row number, the image path or the caption.
"""

from collections.abc import Iterator
from pathlib import Path

from laclip.text_files import open_parquet, read_columns, read_csv_rows, read_keyed, read_lines

PATH_COLUMNS = ("path", "filepath", "image_path", "image", "filename", "url")
CAPTION_COLUMNS = ("caption", "title", "text")


def squeeze(caption: str) -> str:
    """A caption as captions are compared: files differ in the white space that they keep."""
    return " ".join(caption.split())


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
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        yield from read_keyed(path, ("text",), key_needed=True)
    elif original_csv is None:
        raise ValueError(
            f"{path}: neither .jsonl, .csv nor .parquet. For a text file of the LaCLIP release, "
            "line by line, name its original as well: --original-csv FILE"
        )
    else:
        yield from _read_release(path, original_csv, join)


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """(image path, caption) of every row of a CSV or Parquet list, as the LaCLIP release's
    *_original.csv.

    Of a CSV, a first row that names a path column and a caption column is a header; without one
    the first cell is the path and the second the caption.
    """
    if path.suffix == ".parquet":
        yield from _parquet_pairs(path)
        return
    columns = None
    for line, row in read_csv_rows(path):
        if columns is None:
            columns = _pair_columns(row)
            if columns is not None:
                continue
            columns = 0, 1
            if len(row) < 2:
                raise ValueError(
                    f"{path}: line {line}: {len(row)} cells, expected an image path and a caption"
                )
        cell = row[columns[1]].removesuffix("\n")
        yield row[columns[0]], cell


def _parquet_pairs(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        columns = _pair_columns(names)
        if columns is None:
            raise ValueError(
                f"{path}: columns {names[:8]}, expected one of {PATH_COLUMNS} and one of "
                f"{CAPTION_COLUMNS}"
            )
        wanted = [names[i] for i in columns]
        for both in read_columns(path, file, wanted):
            yield from ((a or "", b or "") for a, b in zip(*both, strict=True))


def _pair_columns(row: list[str]) -> tuple[int, int] | None:
    names = [cell.strip().lower() for cell in row]
    paths = [names.index(name) for name in PATH_COLUMNS if name in names]
    captions = [names.index(name) for name in CAPTION_COLUMNS if name in names]
    return (paths[0], captions[0]) if paths and captions else None


def _read_release(path: Path, original_csv: Path, join: str) -> Iterator[tuple[str, str]]:
    lines = read_lines(path)
    count = 0
    for row, (image, caption) in enumerate(read_pairs(original_csv)):
        identity = {"row": str(row), "path": image, "caption": squeeze(caption)}[join]
        text = next(lines, None)
        if text is None:
            rows = sum(1 for _ in read_pairs(original_csv))
            raise ValueError(_line_counts(path, count, original_csv, rows))
        count += 1
        yield identity, text
    more = sum(1 for _ in lines)
    if more:
        raise ValueError(_line_counts(path, count + more, original_csv, count))


def _line_counts(path: Path, lines: int, original_csv: Path, rows: int) -> str:
    text = (
        f"{path}: {lines} lines, but {original_csv} has {rows} rows: line n must be the rewrite of "
        "row n, so every later rewrite would go to a wrong image. Get both files whole"
    )
    if rows == lines + 1:
        first = next(read_pairs(original_csv))
        text += f". If the first row, {first}, is a header, call its columns path and caption"
    return text
