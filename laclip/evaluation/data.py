"""Images to score on: class folders, and webdataset tars as CLIP_benchmark publishes them."""

import os
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")


@dataclass
class ImageSet:
    """Encoded images, found but not read yet.

    names: of each image, for people. places: file, offset and bytes (-1: all). classes: names of
    the class folders, or "0", "1", ... where tars number them. labels: each image's class.
    captions: of each image, where the set is for retrieval. ignored: files that are no images.
    flagged: images that are bad by the index, or have no caption; not among these.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    places: list[tuple[Path, int, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    flagged: int = 0
    numbered: bool = False  # classes are numbers, of which some may have no image

    def read(self, number: int) -> np.ndarray:
        return read_bytes(*self.places[number])


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """Bytes of a file, all from `offset` on where count is -1.

    What fails is tried 5 times within 3 seconds, as training does. Raises OSError then, and
    ValueError for a file that has become shorter: neither is an image that does not decode.
    """
    for pause in (0.2, 0.4, 0.8, 1.6, None):
        try:
            with path.open("rb") as file:
                file.seek(offset)
                content = file.read(count)
            break
        except OSError as error:
            if pause is None or isinstance(error, FileNotFoundError):
                raise OSError(error.errno, error.strerror, str(path)) from None
            time.sleep(pause)
    if len(content) < count:
        raise ValueError(
            f"'{path}' has become shorter while it was read. Bring back the whole file"
        )
    return np.frombuffer(content, np.uint8)


def open_labelled(path: Path) -> ImageSet:
    """Images with a class each: a folder with one folder a class, or with tars of .cls files.

    Raises FileNotFoundError and ValueError for a folder of another kind and for what is broken.
    """
    shards = find_shards(path)
    return _read_class_tars(path, shards) if shards else _find_class_folders(path)


def open_captioned(path: Path) -> ImageSet:
    """Images with captions: tars of .txt files, one caption a line."""
    shards = find_shards(path)
    if not shards:
        raise ValueError(
            f"'{path}': found neither dataset.json nor *.tar, expected a laclip dataset, or tars "
            "with KEY.jpg and KEY.txt"
        )
    images = ImageSet(path)
    for name, place, text in _members(path, shards, "txt", "its captions, one a line"):
        captions = [line.strip() for line in text.splitlines() if line.strip()]
        if not captions:
            raise ValueError(f"{name}: its .txt holds no caption")
        images.names.append(name)
        images.places.append(place)
        images.captions.append(captions)
    return images


def find_shards(path: Path) -> list[Path]:
    """The folder's tars, by number where they have one; as many as nshards.txt says."""
    if not path.is_dir():
        raise FileNotFoundError(f"'{path}': there is no such folder")
    shards = sorted(path.glob("*.tar"), key=lambda shard: (len(shard.name), shard.name))
    splits = sorted({tar.parent.name for tar in path.glob("*/*.tar")})
    if not shards and splits:
        raise ValueError(
            f"'{path}' holds tars in {', '.join(splits)}. Name one of them: {path / splits[0]}"
        )
    announced = path / "nshards.txt"
    if announced.is_file() and announced.read_text().strip() != str(len(shards)):
        raise ValueError(
            f"'{path}': found {len(shards)} tars, {announced} says "
            f"{announced.read_text().strip()}. Download what is missing, or remove what is not "
            "of this set"
        )
    return shards


def _find_class_folders(path: Path) -> ImageSet:
    folders = [entry.name for entry in path.iterdir() if entry.is_dir()]
    folders = [name for name in folders if not name.startswith(".")]
    if not folders:
        raise ValueError(
            f"'{path}': found neither folders nor tars, expected one folder a class with its "
            "images in it, or *.tar with KEY.jpg and KEY.cls"
        )
    numbers = all(name.isdecimal() for name in folders)
    folders.sort(key=lambda name: (int(name) if numbers else 0, name))
    images = ImageSet(path, classes=folders)
    for label, name in enumerate(folders):
        before = len(images.places)
        for folder, below, files in os.walk(path / name, followlinks=True):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for file in (Path(folder, file) for file in sorted(files)):
                if file.suffix[1:].lower() in IMAGE_KINDS and not file.name.startswith("."):
                    images.names.append(str(file.relative_to(path)))
                    images.places.append((file, 0, -1))
                    images.labels.append(label)
                else:
                    images.ignored.append(str(file.relative_to(path)))
        holders = {file.parent for file, *_ in images.places[before:]}
        if len(holders) > 1 and path / name not in holders:
            raise ValueError(
                f"'{path / name}': found {len(holders)} folders of images and no image beside "
                "them, expected the images of one class. If its folders are the classes, give it "
                f"instead of '{path}'"
            )
        if not holders:
            raise ValueError(
                f"'{path / name}': found no image, expected those of class {name!r} "
                f"({', '.join(IMAGE_KINDS)}). Fill the folder or remove it"
            )
    return images


def _read_class_tars(path: Path, shards: list[Path]) -> ImageSet:
    images = ImageSet(path, numbered=True)
    for name, place, text in _members(path, shards, "cls", "the number of its class"):
        if not text.strip().isdecimal():
            raise ValueError(
                f"{name}: its .cls holds {text.strip()[:40]!r}, expected a class's number from 0 on"
            )
        images.names.append(name)
        images.places.append(place)
        images.labels.append(int(text))
    images.classes = [str(label) for label in range(max(images.labels) + 1)]
    return images


def _members(path: Path, shards: list[Path], kind: str, meaning: str):
    """(TAR/KEY, place of the image, contents of KEY.kind) of every sample of the tars."""
    found = 0
    for shard in shards:
        places: dict[str, tuple[Path, int, int]] = {}
        texts: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    folder, _, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if not member.isfile():
                        continue
                    if extension.lower() == kind:
                        texts[key] = tar.extractfile(member).read().decode()  # type: ignore
                    elif extension.lower() in IMAGE_KINDS:
                        if key in places:
                            raise ValueError(f"'{shard}': {key!r} has two images, expected one")
                        places[key] = shard, member.offset_data, member.size
        except (tarfile.TarError, UnicodeDecodeError) as error:
            raise ValueError(f"'{shard}' cannot be read: {error}. Download it again") from None
        with shard.open("rb") as file_end:
            file_end.seek(-512, os.SEEK_END)
            if any(file_end.read()):
                raise ValueError(f"'{shard}' was cut short: it has no end. Download it again")
        if alone := places.keys() ^ texts.keys():
            key = min(alone)
            lacks = f".{kind}, {meaning}" if key in places else f"image ({', '.join(IMAGE_KINDS)})"
            raise ValueError(
                f"'{shard}': {len(alone)} of its {len(places | texts)} samples are not whole; "
                f"{key!r} has no {lacks}"
            )
        found += len(places)
        for key, place in places.items():
            yield f"{shard.name}/{key}", place, texts[key]
    if not found:
        raise ValueError(f"'{path}': its tars hold no images")
