"""Frozen dataclasses from TOML and back: types are checked, unknown keys are errors.

A section is a dataclass, or a dictionary of sections; a leaf a string, a number, a truth value or a
tuple of them.
"""

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from pathlib import Path


def build(kind: typing.Any, value: typing.Any, key: str, source: str) -> typing.Any:
    """What `value`, as tomllib gives it, is of a kind: of a dataclass for a whole tree.

    key: where it stands, "" at the top; source: the file, for the ValueError of what is wrong.
    """
    where = f"{source}: {key}" if key else source
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a section, found {value!r}")
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                what = "section" if not key else "key"
                full = f"{key}.{name}" if key else name
                raise ValueError(f"{source}: unknown {what} {full!r}{nearest(name, hints)}")
        nested = {
            name: build(hints[name], item, f"{key}.{name}" if key else name, source)
            for name, item in value.items()
        }
        return kind(**nested)  # type: ignore[operator]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a section, found {value!r}")
        inner = typing.get_args(kind)[1]
        return {name: build(inner, item, f"{key}.{name}", source) for name, item in value.items()}
    if origin is tuple:
        inner = typing.get_args(kind)
        if isinstance(value, str) and inner[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise ValueError(f"{where}: expected {len(inner)} values, found {len(value)}")
        return tuple(build(inner[0], item, key, source) for item in value)
    assert isinstance(kind, type) and not isinstance(kind, types.GenericAlias)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(
            f"{where}: expected {kind.__name__}, found {value!r} ({type(value).__name__})"
        )
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value


def dump(tree: typing.Any) -> str:
    """A dataclass of dataclasses as TOML; build makes an equal one of it."""
    lines: list[str] = []

    def section(value: typing.Any, name: str) -> None:
        items = value.items() if isinstance(value, dict) else _fields(value)
        nested = []
        if name and not isinstance(value, dict):
            lines.append(f"[{name}]")
        for key, item in items:
            if dataclasses.is_dataclass(item) or isinstance(item, dict):
                nested.append((key, item))
            else:
                lines.append(f"{key} = {_written(item)}")
        if name and not isinstance(value, dict):
            lines.append("")
        for key, item in nested:
            key = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _written(key)
            section(item, f"{name}.{key}" if name else key)

    section(tree, "")
    return "\n".join(lines)


def flatten(value: typing.Any, prefix: str = "") -> dict[str, typing.Any]:
    """Every leaf of a tree of dataclasses and dictionaries by its dotted key."""
    items = value.items() if isinstance(value, dict) else _fields(value)
    leaves: dict[str, typing.Any] = {}
    for key, item in items:
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(item) or isinstance(item, dict):
            leaves |= flatten(item, name + ".")
        else:
            leaves[name] = item
    return leaves


def parse(text: str) -> typing.Any:
    """A value in TOML's syntax; a bare word is taken as a string, in a list too."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text.startswith("[") and text.endswith("]"):  # quotes taken by a shell on the way
            return [parse(item.strip()) for item in text[1:-1].split(",")]
        return text


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """The end of an error about a name: the one that was meant, or all there are."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"


def _fields(value: typing.Any) -> list[tuple[str, typing.Any]]:
    return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]


def _written(value: typing.Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # the escapes are TOML's, too
    return "[" + ", ".join(_written(item) for item in value) + "]"
