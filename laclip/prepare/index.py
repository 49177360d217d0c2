"""laclip index: scan the tars of a folder into .samples files and dataset.json.

    laclip index FOLDER [--decode]

The tars are read once, from end to end, and never written.
"""

import argparse
import shlex
from pathlib import Path

import numpy as np

import laclip
from laclip import _native
from laclip.dataset import (
    BAD,
    DECODED,
    REASONS,
    SAMPLE_RECORD,
    SAMPLES_HEADER,
    SAMPLES_MAGIC,
    SamplesTable,
)
from laclip.prepare.folder import (
    is_whole,
    read_manifest,
    recorded_shards,
    remove_leftovers,
    samples_summary,
    seal,
    tar_paths,
    write_manifest,
    write_whole,
)
from laclip.prepare.shards import add_run_arguments, in_order, run_shards

RULES = 1  # of telling samples, keys and bad ones apart; a change makes every shard be scanned anew
DECODE_FAILED = REASONS.index("does not decode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of webdataset tars (*.tar)")
    parser.add_argument(
        "--decode", action="store_true", help="also decode every image and flag those that fail"
    )
    parser.add_argument("--force", action="store_true", help="scan shards that are up to date too")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    print(index(args.folder, args.decode, args.force, args.jobs, args.ray))
    return 0


def index(
    folder: str | Path,
    decode: bool = False,
    force: bool = False,
    jobs: int = 1,
    ray: bool = False,
) -> str:
    """Scan every tar of `folder` that has no up-to-date .samples file; write dataset.json.

    Of the files that dataset.json records only headers are read: `laclip verify` reads the rest.
    `decode` also decodes every image and flags those that fail. Returns what was found, as text.
    Raises FileNotFoundError without tars, ValueError for tars that are broken or hold no sample,
    with their names and positions, when all others are done. Running it again does what is left.
    """
    folder = Path(folder).resolve() if ray else Path(folder)  # other nodes stand elsewhere
    paths = tar_paths(folder)
    remove_leftovers(folder)
    recorded = recorded_shards(folder)
    if decode:
        jobs = 1  # the decoder brings its own threads
    found = in_order(
        run_shards(
            _index_or_tell,
            [(path, decode, force, recorded.get(path.name)) for path in paths],
            total=len(paths),
            label="index",
            jobs=jobs,
            ray=ray,
            weigh=lambda result: (result["bytes"] / 1e9, "GB"),
        )
    )
    broken = [result["error"] for result in found if "error" in result]
    if broken:
        more = f"\n... and {len(broken) - 20} more" if len(broken) > 20 else ""
        raise ValueError("\n".join(broken[:20]) + more)
    manifest = read_manifest(folder)
    libraries = {**manifest.get("libraries", {}), "laclip": laclip.__version__}
    variants, tokenizer = manifest.get("variants", []), manifest.get("tokenizer")
    captions = {shard["name"]: shard["captions_checksum"] for shard in manifest.get("shards", [])}
    shards = [result["shard"] for result in found]
    kept = write_manifest(folder, shards, captions, variants, tokenizer, libraries)
    text = _report(folder, found)
    later = len(set(tar_paths(folder)) - set(paths))
    if later:
        text += f"\n{later} more tars came meanwhile. Run: laclip index {folder}"
    if variants and not kept:
        named = "".join(f" --rewrites {name}=FILE" for name in variants[1:])
        text += f"\nits captions are not of these samples. Run: laclip tokenize {folder}{named}"
    elif not manifest and any(folder.glob("*.captions")):
        text += (
            "\nthere was no dataset.json to tell what its captions are. "
            f"Run: laclip tokenize {folder}, with --rewrites NAME=FILE for each variant"
        )
    elif not (variants or later):
        text += f"\nNext: laclip tokenize {shlex.quote(str(folder))}"
    return text


def samples_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.samples")


def _index_or_tell(tar: Path, decode: bool, force: bool, recorded: dict | None) -> dict:
    """index_shard, with what is wrong with a tar as a result: all broken ones are told at once."""
    try:
        return index_shard(tar, decode, force, recorded)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename != str(tar):
            raise  # of its sidecar: a full disk
        return {"error": str(error), "bytes": 0}


def index_shard(
    tar: Path, decode: bool = False, force: bool = False, recorded: dict | None = None
) -> dict:
    """Write the .samples file of one tar. Returns its summary and what was read and left out.

    recorded: what dataset.json says of the shard. A .samples file that is still that one is not
    read, and `reasons` are None; one that an interrupted run left is checked byte by byte.
    """
    path = samples_path(tar)
    old = None if force else _old_table(path)
    if old is not None:
        nothing_read = {"bytes": 0, "other_members": 0}
        status = tar.stat()
        # Another tar that was moved here may be old itself: its change is not.
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        current = old.header["shard_bytes"] == status.st_size and (
            path.stat().st_mtime_ns >= changed
        )
        if current and recorded and not decode and _is_recorded(old, recorded):
            return {"shard": recorded, "reasons": None, **nothing_read}
        if not _says_all(old, decode):
            old = None
        elif current:
            return {**samples_summary(path), **nothing_read}
    scan = _native.scan_tar(str(tar))
    if old is not None and old.header["shard_checksum"] == scan["shard_checksum"]:
        parts = [np.fromfile(path, np.uint8)]  # a copy of the tar: what --decode found of it stays
    else:
        parts = _samples_file(tar, scan, decode)
    write_whole(path, parts)
    return {
        **samples_summary(path),
        "bytes": scan["shard_bytes"],
        "other_members": scan["other_members"],
    }


def _samples_file(tar: Path, scan: dict, decode: bool) -> list[np.ndarray]:
    if scan["count"] == 0:
        raise ValueError(
            f"{tar}: holds no samples, expected members such as KEY.jpg and KEY.txt, where KEY has "
            "no dot. Remove it or make it again"
        )
    records = np.frombuffer(scan["records"], SAMPLE_RECORD).copy()
    if decode:
        from laclip.prepare.decode import find_undecodable

        good = np.flatnonzero(records["flags"] & BAD == 0)
        failed = good[find_undecodable(tar, records[good])]
        records["flags"][good] |= DECODED
        records["flags"][failed] |= BAD
        records["reason"][failed] = DECODE_FAILED
    header = np.zeros((), SAMPLES_HEADER)
    header["magic"] = SAMPLES_MAGIC
    header["count"], header["keys_bytes"] = scan["count"], len(scan["keys"])
    header["shard_bytes"], header["shard_checksum"] = scan["shard_bytes"], scan["shard_checksum"]
    header["rules"] = RULES
    return seal(header, [records.tobytes(), scan["key_end"], scan["keys"]])


def _old_table(path: Path) -> SamplesTable | None:
    """An earlier run's .samples file, if its header is sound."""
    try:
        table = SamplesTable(path)
    except (FileNotFoundError, ValueError):
        return None
    return table if table.header["rules"] == RULES else None


def _is_recorded(table: SamplesTable, shard: dict) -> bool:
    return (len(table), table.checksum) == (shard["samples"], shard["samples_checksum"])


def _says_all(table: SamplesTable, decode: bool) -> bool:
    """Whether a .samples file is whole, and every image of it was decoded where that is asked."""
    good = table.records["flags"] & BAD == 0
    decoded = not decode or bool(np.all(table.records["flags"][good] & DECODED))
    return decoded and is_whole(table)


def _repeated_keys(folder: Path, shards: list[dict]) -> str:
    """Keys that occur in several shards are legal, as rewrites reach all of them; say how many."""
    hashes = np.empty(sum(shard["samples"] for shard in shards), np.uint64)
    at = 0
    for shard in shards:
        table = SamplesTable(samples_path(folder / shard["name"]))
        hashes[at : at + len(table)] = table.key_hashes()
        at += len(table)
    hashes.sort()
    repeated = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(repeated):
        return ""
    places: list[str] = []
    for shard in shards:
        table = SamplesTable(samples_path(folder / shard["name"]))
        found = np.flatnonzero(table.key_hashes() == repeated[0]).tolist()
        places += [f"{shard['name']}: {table.key(i)}" for i in found]
        if len(places) > 1:
            break
    return f"\n  {len(repeated)} keys occur more than once (first: {' and '.join(places[:2])})"


def _report(folder: Path, found: list[dict]) -> str:
    """Samples, and bad ones by reason with the first key of each."""
    shards = [result["shard"] for result in found]
    count, bad = sum(s["samples"] for s in shards), sum(s["bad"] for s in shards)
    text = f"{folder}: {count} samples in {len(shards)} shards, {bad} bad"
    totals: dict[int, list] = {}
    told = 0
    for result in found:
        for reason, (times, key) in (result["reasons"] or {}).items():
            entry = totals.setdefault(reason, [0, f"{result['shard']['name']}: {key}"])
            entry[0] += times
            told += times
    for reason, (times, first) in sorted(totals.items()):
        text += f"\n  {times} x {REASONS[reason]} (first: {first})"
    if bad > told:
        text += f"\n  {bad - told} x found by an earlier run"
    if bad:
        text += f"\n  all of them: laclip inspect {folder} --bad"
    others = sum(result["other_members"] for result in found)
    if others:
        text += f"\n  {others} files in the tars belong to no sample"
    if all(result["reasons"] is None for result in found):
        return text  # repeated keys were told before
    return text + _repeated_keys(folder, shards)
