"""Files that are there whole or not at all, whatever ends the process or the machine."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, such that at any moment the old or the new one is there, whole.

    It is written under a temporary name beside it (.NAME.tmp where none is given), synced, renamed,
    and the folder synced. On any error the temporary file is removed; a killed process leaves it.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    sync(path.parent)


def _name(error: BaseException, path: Path) -> None:
    """A full disk has no name of its own."""
    if isinstance(error, OSError) and error.errno and error.filename is None:
        error.filename = str(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill with files, which come to `path` together, once all are on the disk.

    A new folder comes by one rename. Into one that is there each file comes by its own, and files
    of other names stay. On any error what was written is removed; what a killed process left, the
    next one removes.
    """
    path = path.resolve()
    there = path.is_dir()
    temporary = path / ".laclip.tmp" if there else path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = list(temporary.iterdir())
        for entry in (*files, temporary):
            sync(entry)
        if there:
            for file in files:
                os.replace(file, path / file.name)
            temporary.rmdir()
        else:
            temporary.rename(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name(error, path)
        raise
    sync(path if there else path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
