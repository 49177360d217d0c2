"""Captions to rewrite, shard by shard: a laclip dataset, tars, CSV, Parquet, JSONL, text lines."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from laclip import _native
from laclip.dataset import checksum_hex, open_dataset
from laclip.text_files import open_parquet, read_keyed, read_lines

KINDS = (".tar", ".jsonl", ".csv", ".parquet", ".txt")
TEXT_NAMES = ("caption", "title", "text")
MAX_BYTES = 1 << 16  # read of one caption in a tar, as `laclip tokenize` does


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
        with suppress(ValueError), open_parquet(path) as file:  # told when the shard's turn comes
            return CaptionShard(path, file.metadata.num_rows)
    elif path.suffix != ".tar" and path.stat().st_size < 1 << 28:
        return CaptionShard(path, path.read_bytes().count(b"\n"))
    return CaptionShard(path)


def _read_tar(path: Path) -> Iterator[tuple[str, str]]:
    for key, data in _native.read_tar_texts(str(path), "txt", MAX_BYTES):
        yield key, data.decode(errors="replace")


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_lines(path)):
        yield str(number), line


def _read_keyed(path: Path) -> Iterator[tuple[str, str]]:
    return read_keyed(path, TEXT_NAMES, key_needed=False)


_READERS = {
    ".tar": _read_tar,
    ".jsonl": _read_keyed,
    ".csv": _read_keyed,
    ".parquet": _read_keyed,
    ".txt": _read_text,
}
