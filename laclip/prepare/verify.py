"""laclip verify: check every file of a dataset against every other.

    laclip verify FOLDER

Reads all bytes once. Exits with 1 and a list when anything is wrong.
"""

import argparse
from pathlib import Path

import numpy as np

from laclip import _native
from laclip.dataset import (
    BAD,
    CAPTION_MISSING,
    DECODED,
    POSITION_MASK,
    SAMPLE_RECORD,
    CaptionsTable,
    Dataset,
    SamplesTable,
    Shard,
    open_dataset,
)
from laclip.prepare.folder import is_whole, manifest_text, read_manifest
from laclip.prepare.index import DECODE_FAILED
from laclip.prepare.shards import add_run_arguments, in_order, run_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="a dataset")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    problems = verify(args.folder, args.jobs, args.ray)
    dataset = open_dataset(args.folder)
    for problem in problems:
        print(problem)
    count = f"{len(problems)} problem(s)" if problems else "all files are whole and fit each other"
    print(f"{args.folder}: {len(dataset.shards)} shards, {dataset.num_samples} samples: {count}")
    return 1 if problems else 0


def verify(folder: str | Path, jobs: int = 1, ray: bool = False) -> list[str]:
    """Every problem of a dataset, each with its file and what to run; an empty list if all is well.

    Checked: dataset.json's own bytes; each sidecar's checksum, sizes, order and what dataset.json
    says of it; each tar's checksum, and that scanning it again gives the same records; captions
    against samples and tokenizer; sidecars without a shard.
    """
    dataset = open_dataset(Path(folder).resolve() if ray else folder)
    problems = _check_manifest(dataset)
    tasks = [(dataset.path, shard, dataset.variants, dataset.tokenizer) for shard in dataset.shards]
    found = in_order(
        run_shards(
            check_shard,
            tasks,
            total=len(tasks),
            label="verify",
            jobs=jobs,
            ray=ray,
            weigh=lambda result: (result[0] / 1e9, "GB"),
        )
    )
    for _, shard_problems in found:
        problems += shard_problems
    return problems


def _check_manifest(dataset: Dataset) -> list[str]:
    folder, problems = dataset.path, []
    file = folder / "dataset.json"
    if file.read_bytes() != manifest_text(read_manifest(folder)):
        problems.append(f"{file}: was changed after it was written. Run: laclip index {folder}")
    names = [shard.name for shard in dataset.shards]
    if len(set(names)) != len(names):
        problems.append(f"{file}: lists a shard twice. Run: laclip index {folder}")
    known = set(names)
    for path in sorted(folder.iterdir()):
        if path.suffix in (".tar", ".samples", ".captions") and f"{path.stem}.tar" not in known:
            there = (folder / f"{path.stem}.tar").exists()
            run = f"Run: laclip index {folder}" if there else "Its tar is gone: remove it"
            problems.append(f"{path}: no shard of dataset.json. {run}")
    return problems


def check_shard(
    folder: Path, shard: Shard, variants: tuple[str, ...], tokenizer: str | None
) -> tuple[int, list[str]]:
    """The bytes read and the problems of one shard."""
    problems: list[str] = []
    samples = None
    try:
        table = SamplesTable(folder / f"{shard.stem}.samples")
        problems += _check_samples(table, shard)
        samples = table if is_whole(table) else None  # keys of broken bytes are none
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    if variants:
        try:
            captions = CaptionsTable(folder / f"{shard.stem}.captions")
            problems += _check_captions(captions, shard, variants, tokenizer)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    size, tar_problems = _check_tar(folder / shard.name, samples)
    return size, problems + tar_problems


def _check_samples(table: SamplesTable, shard: Shard) -> list[str]:
    problems = []
    run = f"Run: laclip index --force {table.path.parent}"
    if not is_whole(table):
        return [f"{table.path}: its bytes do not give its checksum. {run}"]
    if table.checksum != shard.samples_checksum or len(table) != shard.samples:
        problems.append(f"{table.path}: is not the file that dataset.json records. {run}")
    if np.count_nonzero(table.records["flags"] & BAD) != shard.bad:
        problems.append(f"{table.path}: another number of bad samples than recorded. {run}")
    return problems


def _check_captions(
    table: CaptionsTable, shard: Shard, variants: tuple[str, ...], tokenizer: str | None
) -> list[str]:
    problems = []
    named = "".join(f" --rewrites {name}=FILE" for name in variants[1:])
    run = f"Run: laclip tokenize {table.path.parent}{named}"
    if not is_whole(table):
        return [f"{table.path}: its bytes do not give its checksum. {run}"]
    if table.checksum != shard.captions_checksum:
        problems.append(f"{table.path}: is not the file that dataset.json records. {run}")
    if table.samples_checksum != shard.samples_checksum:
        problems.append(f"{table.path}: was made for other samples. {run}")
    if (table.count, table.variants, table.tokenizer) != (shard.samples, len(variants), tokenizer):
        problems.append(
            f"{table.path}: {table.count} samples x {table.variants} variants by "
            f"{table.tokenizer}, expected {shard.samples} x {len(variants)} by {tokenizer}. {run}"
        )
    positions = (table.entries & POSITION_MASK).astype(np.int64)
    lengths = np.diff(positions)
    missing = table.entries[:-1] & CAPTION_MISSING != 0
    if (lengths < 0).any() or positions[0] != 0 or positions[-1] != len(table.all_tokens):
        problems.append(f"{table.path}: its offsets are out of order. {run}")
    elif (lengths[missing] != 0).any():
        problems.append(f"{table.path}: a missing caption has tokens. {run}")
    return problems


def _check_tar(tar: Path, samples: SamplesTable | None) -> tuple[int, list[str]]:
    again = "Get the tar again, or run: laclip index --force"
    try:
        scan = _native.scan_tar(str(tar))
    except FileNotFoundError:
        return 0, [f"{tar} is missing. Get it again, or run: laclip index {tar.parent}"]
    except ValueError as error:
        return tar.stat().st_size, [f"{error}. {again} {tar.parent}"]
    size = scan["shard_bytes"]
    if samples is None:
        return size, []
    if (size, scan["shard_checksum"]) != (
        samples.header["shard_bytes"],
        samples.header["shard_checksum"],
    ):
        return size, [
            f"{tar}: {size} bytes, XXH64 {scan['shard_checksum']:016x}; when it was indexed "
            f"{samples.header['shard_bytes']} bytes, {samples.header['shard_checksum']:016x}. "
            f"{again} {tar.parent}"
        ]
    records = np.frombuffer(scan["records"], SAMPLE_RECORD)
    seen = samples.records.copy()
    failed = seen["reason"] == DECODE_FAILED
    seen["reason"][failed] = 0
    seen["flags"][failed] &= ~np.uint16(BAD)
    seen["flags"] &= ~np.uint16(DECODED)
    if not np.array_equal(seen, records) or samples.keys() != _keys(scan):
        return size, [
            f"{samples.path}: does not say what the tar holds. "
            f"Run: laclip index --force {tar.parent}"
        ]
    return size, []


def _keys(scan: dict) -> list[str]:
    ends = np.frombuffer(scan["key_end"], "<u4").tolist()
    return [scan["keys"][a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]
