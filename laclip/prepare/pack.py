"""laclip pack: a CSV or Parquet list of image paths and captions into webdataset shards.

    laclip pack OUT --pairs FILE.csv --images FOLDER

Shard s takes rows [s * n, (s + 1) * n): whatever is skipped, a row keeps its number, and rewrites
that come line by line with the list still find it.
"""

import argparse
import io
import json
import os
import shlex
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from laclip import _native
from laclip.dataset import REASONS, as_hex, checksum_hex
from laclip.prepare.folder import remove_leftovers, temporary_name, write_whole
from laclip.prepare.shards import add_run_arguments, in_order, run_shards
from laclip.prepare.sources import CAPTION_COLUMNS, PATH_COLUMNS, read_pairs
from laclip.whole_files import whole_file

RECORD = "pack.json"  # what was packed, beside the shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument(
        "--pairs",
        type=Path,
        required=True,
        help=f"CSV, TSV or Parquet with a path column ({', '.join(PATH_COLUMNS)}) and a caption "
        f"column ({', '.join(CAPTION_COLUMNS)}); without a header: path, caption",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder that the paths start in")
    parser.add_argument(
        "--rows", type=int, default=10_000, help="rows of the list a shard (default: 10000)"
    )
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    print(pack(args.out, args.pairs, args.images, args.rows, args.jobs, args.ray))
    return 0


def pack(
    out: str | Path,
    pairs: str | Path,
    images: str | Path,
    rows: int = 10_000,
    jobs: int = 1,
    ray: bool = False,
) -> str:
    """Write OUT/00000.tar, ...; returns a report. Shards that are there already are kept.

    Each sample: KEY.jpg (or .png, .webp: the file's own bytes), KEY.txt, and KEY.json with the row
    number and the path as the list has it; KEY is the row number. Rows without a readable image or
    a caption are skipped and counted by reason. Raises ValueError when OUT holds shards of another
    list.
    """
    out, pairs, images = Path(out), Path(pairs), Path(images)
    if ray:  # other nodes stand elsewhere
        out, images = out.resolve(), images.resolve()
    if rows < 1:
        raise ValueError(f"--rows {rows}: expected 1 or more")
    if not images.is_dir():
        raise FileNotFoundError(f"{images}: no such folder of images")
    count, checksum = 0, 0
    for path, caption in read_pairs(pairs):
        count += 1
        line = np.frombuffer(f"{checksum:x}\0{path}\0{caption}".encode(), np.uint8)
        checksum = _native.xxh64(line)
    if count == 0:
        raise ValueError(f"{pairs}: no rows in it")
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    source = {"rows": count, "rows_a_shard": rows, "checksum": as_hex(checksum)}
    _check_source(out, source, pairs)
    write_whole(out / RECORD, [json.dumps({"source": source}, indent=2).encode() + b"\n"])
    shards = (count + rows - 1) // rows
    results = in_order(
        run_shards(
            pack_shard,
            ((out, images, i, i * rows, chunk) for i, chunk in enumerate(_chunks(pairs, rows))),
            total=shards,
            label="pack",
            jobs=jobs,
            ray=ray,
            weigh=lambda result: (0 if result["kept"] else result["packed"], "images"),
        )
    )
    packed = sum(result["packed"] for result in results)
    skipped: dict[str, list] = {}
    for result in results:
        for reason, (times, first) in result["skipped"].items():
            entry = skipped.setdefault(reason, [0, first])
            entry[0] += times
    reasons = [f"  {n} x {reason} (first: {first})" for reason, (n, first) in skipped.items()]
    if packed == 0:
        for file in (out / RECORD, *out.glob("*.packed")):
            file.unlink()
        raise ValueError(
            "\n".join([f"{pairs}: none of its {count} rows could be packed", *reasons])
            + f"\nIs {images} the folder that the paths start in, and has the list a header with a "
            "path and a caption column (laclip pack --help)?"
        )
    record = {"source": source, "packed": packed, "skipped": skipped}
    write_whole(out / RECORD, [json.dumps(record, indent=2, ensure_ascii=False).encode() + b"\n"])
    lines = [f"{out}: {packed} of {count} rows packed", *reasons]
    if kept := sum(result["kept"] and bool(result["skipped"]) for result in results):
        lines.append(
            f"  {kept} of {shards} shards are an earlier run's: what they skip was not looked for "
            "again. If it has come since, pack into another folder"
        )
    return "\n".join([*lines, f"Next: laclip index {shlex.quote(str(out))}"])


def _check_source(out: Path, source: dict, pairs: Path) -> None:
    try:
        old = json.loads((out / RECORD).read_bytes())["source"]
    except FileNotFoundError:
        if any(out.glob("*.tar")):
            raise ValueError(f"{out}: holds tars that laclip pack did not write") from None
        return
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out / RECORD}: damaged. Remove {out} and pack again") from None
    if old != source:
        raise ValueError(
            f"{out}: holds shards of another list or shard size (packed: {old}, {pairs}: {source})."
            " Choose another folder"
        )


def _chunks(pairs: Path, rows: int) -> Iterator[list[tuple[str, str]]]:
    reader = read_pairs(pairs)
    while chunk := list(islice(reader, rows)):
        yield chunk


def pack_shard(out: Path, images: Path, number: int, first_row: int, chunk: list) -> dict:
    """Write one shard; returns how many rows were packed, and those skipped by reason."""
    skipped: dict[str, list] = {}
    packed = 0
    tar_path = out / f"{number:05}.tar"
    old = _old_result(out / f"{number:05}.packed", tar_path)
    if old is not None:
        return {**old, "kept": True}
    root = images.resolve()
    with (
        whole_file(tar_path, temporary_name(tar_path)) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for row, (path, caption) in enumerate(chunk, first_row):
            data, kind, reason = _image(root, path)
            if not reason and not caption.strip():
                reason = "no caption"
            if reason:
                entry = skipped.setdefault(reason, [0, f"row {row}: {path}"])
                entry[0] += 1
                continue
            packed += 1
            extra = json.dumps({"laclip_row": row, "laclip_path": path}, ensure_ascii=False)
            for extension, payload in ((kind, data), ("txt", caption), ("json", extra)):
                payload = payload.encode() if isinstance(payload, str) else payload
                member = tarfile.TarInfo(f"{row:09}.{extension}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    size = tar_path.stat().st_size
    if not packed:
        tar_path.unlink()
    result = {"packed": packed, "skipped": skipped, "bytes": size}
    text = json.dumps({"checksum": checksum_hex(json.dumps(result).encode()), **result})
    write_whole(out / f"{number:05}.packed", [text.encode()])
    return {**result, "kept": False}


def _old_result(record: Path, tar: Path) -> dict | None:
    """What an earlier run left for this shard, if it is whole."""
    try:
        result = json.loads(record.read_bytes())
        checksum = result.pop("checksum")
        size = tar.stat().st_size if result["packed"] else result["bytes"]
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    whole = checksum == checksum_hex(json.dumps(result).encode()) and size == result["bytes"]
    return result if whole else None


def _image(root: Path, path: str) -> tuple[bytes, str, str]:
    """The bytes of an image, the extension of its kind, and why it is skipped or ""."""
    try:
        # A link in the folder is its owner's, as in a cache of downloads; "../" is the list's.
        place = Path(os.path.normpath(root / path))
        if not (place.is_relative_to(root) or place.resolve().is_relative_to(root)):
            return b"", "", "path leaves the image folder"
        if not path or not place.is_file():
            return b"", "", "no such file"
        data = place.read_bytes()
    except (OSError, ValueError) as error:
        return b"", "", f"cannot be read: {getattr(error, 'strerror', None) or 'not a path'}"
    kind, *_, reason = _native.parse_image_header(np.frombuffer(data, np.uint8))
    return data, ("", "jpg", "png", "webp")[kind], REASONS[reason] if reason else ""
