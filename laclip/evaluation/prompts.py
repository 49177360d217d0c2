"""Names of classes, and the templates that make sentences of them."""

import re
from pathlib import Path

from laclip.evaluation.data import ImageSet

FOLDER = Path(__file__).with_name("names")
TEMPLATES = ("simple", "openai")  # LaCLIP's 7 for CC3M, CC12M and RedCaps; OpenAI's 80
WNID = re.compile(r"n\d{8}")


def find_class_names(images: ImageSet, given: str | None) -> tuple[list[str], str]:
    """A name for every class of a labelled set, and where the names are from.

    given: a file with one name a line, in the classes' order, or "imagenet". Else ImageNet's own
    names where all folders are ImageNet's, `classnames.txt` in the set's folder or the one above,
    the folders'.
    """
    file = Path(given) if given else _beside(images.path, "classnames.txt")
    wnids = not images.numbered and all(WNID.fullmatch(name) for name in images.classes)
    if given is None and wnids:
        return _imagenet_names(images), "ImageNet's"
    if file is None and all(name.isdecimal() for name in images.classes):
        raise FileNotFoundError(
            f"'{images.path}': its classes are numbers; found no classnames.txt there or in the "
            "folder above, expected one class's name a line, in the numbers' order. Name it as "
            "classnames (or imagenet, for its 1,000)"
        )
    if file is None:
        return [name.replace("_", " ") for name in images.classes], "the folders'"
    names = list(_imagenet().values()) if given == "imagenet" else _lines(file, "class names")
    if images.numbered and len(names) < len(images.classes):
        number = images.labels.index(len(images.classes) - 1)
        raise ValueError(
            f"'{images.path}': {images.names[number]} is of class {len(images.classes) - 1}, "
            f"'{file}' names {len(names)} classes, 0 to {len(names) - 1}. Name a file "
            "with the right names as classnames"
        )
    if not images.numbered and len(names) != len(images.classes):
        raise ValueError(
            f"'{file}' names {len(names)} classes, '{images.path}' has {len(images.classes)} class "
            f"folders ({', '.join(images.classes[:3])}, ...). Name a file with as many names, in "
            "the folders' order, as classnames"
        )
    if not images.numbered:
        _check_order(names, images, file)
    return names, "ImageNet's" if given == "imagenet" else str(file)


def _check_order(names: list[str], images: ImageSet, file: Path) -> None:
    """A list in another order would give classes each other's names, and pass for a bad model."""
    folders = {_plain(folder): folder for folder in images.classes}
    for number, (name, folder) in enumerate(zip(names, images.classes)):
        if folders.get(_plain(name), folder) != folder:
            raise ValueError(
                f"'{file}' line {number + 1}: {name!r} would be the name of folder '{folder}', "
                f"there is a folder '{folders[_plain(name)]}'. Name a file with the names in the "
                "folders' order as classnames"
            )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).casefold()


def find_templates(images: ImageSet, given: str | None) -> tuple[list[str], str]:
    """The templates, `{}` for a class's name in each, and where they are from.

    given: one of TEMPLATES, or a file. Else `zeroshot_classification_templates.txt` in the set's
    folder or the one above, else `simple`.
    """
    if given in TEMPLATES:
        file, source = FOLDER / f"templates_{given}.txt", given
    elif given is not None:
        file, source = Path(given), given
    elif beside := _beside(images.path, "zeroshot_classification_templates.txt"):
        file, source = beside, str(beside)
    else:
        file, source = FOLDER / "templates_simple.txt", "simple"
    templates = [line.replace("{c}", "{}") for line in _lines(file, "templates")]
    for number, template in enumerate(templates):
        if "{}" not in template:
            raise ValueError(
                f"'{file}' line {number + 1}: {template!r} has no place for the class's name. "
                "Write {} there"
            )
    return templates, source


def _beside(folder: Path, name: str) -> Path | None:
    folder = folder.absolute()
    found = [file for file in (folder / name, folder.parent / name) if file.is_file()]
    return found[0] if found else None


def _lines(file: Path, what: str) -> list[str]:
    if file.is_dir() or not file.exists():  # a pipe will do
        raise FileNotFoundError(
            f"'{file}': there is no such file, expected {what}, one a line"
            f" (or {' or '.join(TEMPLATES) if what == 'templates' else 'imagenet'})"
        )
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not UTF-8: {error}") from None
    lines = [line.strip() for line in text.rstrip().split("\n")]
    for number, line in enumerate(lines):
        if not line:
            raise ValueError(f"'{file}' line {number + 1} is empty, expected {what}, one a line")
    return lines


def _imagenet() -> dict[str, str]:
    """The names of ImageNet's classes by their WordNet ids, in its order."""
    lines = (FOLDER / "imagenet_classes.tsv").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def _imagenet_names(images: ImageSet) -> list[str]:
    names = _imagenet()
    strangers = [wnid for wnid in images.classes if wnid not in names]
    if strangers:
        raise ValueError(
            f"'{images.path}': {len(strangers)} of its {len(images.classes)} folders are WordNet "
            f"ids that ImageNet-1k does not have: {', '.join(strangers[:5])}. Remove them, or name "
            "all classes in a file given as classnames"
        )
    return [names[wnid] for wnid in images.classes]
