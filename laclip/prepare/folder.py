"""Writing into a dataset's folder: whole files or nothing, and dataset.json from the sidecars."""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from laclip import _native
from laclip.dataset import (
    BAD,
    FORMAT,
    VERSION,
    CaptionsTable,
    SamplesTable,
    checksum_hex,
    open_dataset,
)
from laclip.whole_files import whole_file

_HOST = re.sub("[^A-Za-z0-9]", "_", os.uname().nodename)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that tells whose it is, for `remove_leftovers`."""
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def write_whole(path: Path, chunks: Iterable[Any]) -> None:
    """Write a file from its parts, whole or not at all."""
    with whole_file(path, temporary_name(path)) as file:
        for chunk in chunks:
            file.write(chunk)


def seal(header: np.ndarray, parts: Iterable[bytes | np.ndarray]) -> list[np.ndarray]:
    """A sidecar's content, the header's `checksum` set: XXH64 of the file with it zero."""
    header["version"], header["header_bytes"] = VERSION, header.itemsize
    header["checksum"] = 0
    whole = np.concatenate([np.frombuffer(part, np.uint8) for part in (header.tobytes(), *parts)])
    header["checksum"] = _native.xxh64(whole)
    whole[: header.itemsize] = np.frombuffer(header.tobytes(), np.uint8)
    return [whole]


def is_whole(table: SamplesTable | CaptionsTable) -> bool:
    """Whether the bytes of a sidecar give its `checksum`, the last field of its header."""
    data = np.fromfile(table.path, np.uint8)
    data[table.header.itemsize - 8 : table.header.itemsize] = 0
    return _native.xxh64(data) == table.header["checksum"]


def tar_paths(folder: Path) -> list[Path]:
    """The tars of a dataset in the order of its shards: by name. Raises when there is none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with tars")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(".tar"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no file *.tar in it; expected webdataset shards")
    for name in map(os.fsencode, paths):
        if name.decode(errors="ignore").encode() != name:
            raise ValueError(f"{name!r}: a name that is not UTF-8. Rename it")
    return paths


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of this machine's dead processes (a write under way is left alone)."""
    for path in folder.glob(".*.tmp"):
        host, *rest = path.name.split(".")[-2].split("-")
        if host == _HOST and len(rest) == 2 and not Path(f"/proc/{rest[0]}").exists():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict:
    """dataset.json as it is, or an empty one where no dataset can be opened by it."""
    try:
        open_dataset(folder)
        return json.loads((folder / "dataset.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def recorded_shards(folder: Path) -> dict[str, dict]:
    """The shards' entries of dataset.json by name, if it is as it was written."""
    manifest = read_manifest(folder)
    if not manifest or manifest_text(manifest) != (folder / "dataset.json").read_bytes():
        return {}
    return {shard["name"]: shard for shard in manifest["shards"]}


def samples_summary(path: Path) -> dict:
    """A shard's entry of dataset.json, from its .samples file, and its bad samples by reason.

    Nothing stays mapped: 41,400 open maps would pass the limit on open files.
    """
    table = SamplesTable(path)
    bad = np.flatnonzero(table.records["flags"] & BAD)
    reasons: dict[int, tuple[int, str]] = {}
    for index, reason in zip(bad.tolist(), table.records["reason"][bad].tolist(), strict=True):
        times, first = reasons.get(reason, (0, table.key(index)))
        reasons[reason] = times + 1, first
    shard = {
        "name": f"{path.stem}.tar",
        "samples": len(table),
        "bad": len(bad),
        "samples_checksum": table.checksum,
    }
    return {"shard": shard, "reasons": reasons}


def write_manifest(
    folder: Path,
    shards: list[dict],
    captions: dict[str, str],
    variants: list[str],
    tokenizer: str | None,
    libraries: dict[str, str],
) -> bool:
    """Write dataset.json from the shards' entries (`samples_summary`), in their order.

    captions: the checksum of each shard's .captions file, by the shard's name. They are recorded
    only if every shard still has just that file, made for just these samples; otherwise the dataset
    counts as not tokenized. Returns whether they are recorded.
    """
    tokenized = bool(variants) and all(
        _has_captions(folder, shard, captions.get(shard["name"])) for shard in shards
    )
    head = {
        "format": FORMAT,
        "version": VERSION,
        "variants": variants if tokenized else [],
        "tokenizer": tokenizer if tokenized else None,
        "libraries": libraries,
    }
    entries = [
        {**shard, "captions_checksum": captions[shard["name"]] if tokenized else None}
        for shard in shards
    ]
    write_whole(folder / "dataset.json", [manifest_text({**head, "shards": entries})])
    return tokenized


def manifest_text(manifest: dict) -> bytes:
    """dataset.json as it is written: a shard a line, and last a checksum of all the rest."""
    head = {k: v for k, v in manifest.items() if k not in ("shards", "checksum")}
    lines = ",\n".join("    " + json.dumps(shard) for shard in manifest["shards"])
    text = json.dumps(head, indent=2)[:-2] + ',\n  "shards": [\n' + lines + "\n  ]"
    checksum = checksum_hex(text.encode())
    return f'{text},\n  "checksum": "{checksum}"\n}}\n'.encode()


def _has_captions(folder: Path, shard: dict, checksum: str | None) -> bool:
    try:
        table = CaptionsTable(folder / f"{shard['name'].removesuffix('.tar')}.captions")
    except (FileNotFoundError, ValueError):
        return False
    return table.checksum == checksum and table.samples_checksum == shard["samples_checksum"]
