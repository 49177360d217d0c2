"""laclip tokenize: captions and rewrites into .captions files.

    laclip tokenize FOLDER --rewrites NAME=FILE.jsonl ...

Originals come from KEY.txt in the tars; tars are never written. Variants that the dataset has
already are kept, those named here are added or replaced.
"""

import argparse
import importlib.metadata
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import laclip
from laclip.dataset import checksum_hex, open_dataset
from laclip.prepare.captions import (
    CONTEXT_TOKENS,
    JOURNAL,
    LENGTHS,
    MAX_TOKENS,
    Source,
    VariantCount,
    aligned,
    has_texts,
    open_texts,
    tokenize_shard,
)
from laclip.prepare.folder import (
    remove_leftovers,
    samples_summary,
    temporary_name,
    write_manifest,
)
from laclip.prepare.shards import add_run_arguments, in_order, run_shards
from laclip.prepare.sources import read_pairs, read_rewrites, squeeze
from laclip.prepare.store import TextStore, build_store
from laclip.tokenizer import load_tokenizer

RULES = 1  # of turning texts into entries


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="an indexed dataset")
    parser.add_argument(
        "--rewrites",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a variant and its texts: .jsonl, .csv or .parquet by key; json:FIELD for a field of "
        "KEY.json in the tars; or a text file of the LaCLIP release (with --original-csv)",
    )
    parser.add_argument(
        "--original-csv",
        type=Path,
        help="*_original.csv, or the Parquet list, that the text files follow line by line",
    )
    parser.add_argument(
        "--join",
        choices=("row", "path", "caption"),
        default="row",
        help="how rows of --original-csv find samples: the row number or the image path that "
        "`laclip pack` recorded, or the exact caption (default: row)",
    )
    parser.add_argument(
        "--drop", action="append", default=[], metavar="NAME", help="leave a variant out"
    )
    parser.add_argument("--tokenizer", default="clip", help="clip (default) or sentencepiece:FILE")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    rewrites: dict[str, str] = {}
    for given in args.rewrites:
        name, equals, file = given.partition("=")
        if not equals or not name or not file:
            raise ValueError(f"--rewrites {given}: expected NAME=FILE")
        if name in rewrites:
            raise ValueError(
                f"--rewrites {given}: {name} is {rewrites[name]} already. Join the files, or give "
                "each a name of its own"
            )
        rewrites[name] = file
    print(
        tokenize(
            args.folder,
            rewrites,
            tokenizer=args.tokenizer,
            original_csv=args.original_csv,
            join=args.join,
            drop=tuple(args.drop),
            jobs=args.jobs,
            ray=args.ray,
        )
    )
    return 0


def tokenize(
    folder: str | Path,
    rewrites: dict[str, Any] | None = None,
    *,
    tokenizer: str = "clip",
    original_csv: Path | None = None,
    join: str = "row",
    drop: tuple[str, ...] = (),
    jobs: int = 1,
    ray: bool = False,
) -> str:
    """Write every shard's .captions file and dataset.json; returns a report as text.

    rewrites: variant -> file (see `sources.read_rewrites`) or "json:FIELD". Variants of the
    dataset that are neither named nor dropped are kept as they are. Raises ValueError or
    FileNotFoundError for what does not fit, before any file of the dataset is touched. A run that
    was cut off goes on where it stopped when it is started again with the same arguments.
    """
    rewrites = dict(rewrites or {})
    dataset = open_dataset(Path(folder).resolve() if ray else folder)
    folder = dataset.path
    if ray and tokenizer.startswith("sentencepiece:"):
        tokenizer = f"sentencepiece:{Path(tokenizer.removeprefix('sentencepiece:')).resolve()}"
    fingerprint = load_tokenizer(tokenizer).fingerprint
    for name in drop:
        if name not in dataset.variants or name == "original":
            raise ValueError(f"--drop {name}: the dataset has {list(dataset.variants)}")
    if "original" in rewrites:
        raise ValueError("--rewrites original=...: original is the name of KEY.txt in the tars")
    kept = [v for v in dataset.variants if v != "original" and v not in drop]
    if dataset.tokenizer not in (None, fingerprint) and set(kept) - set(rewrites):
        raise ValueError(
            f"{folder}: its variants {sorted(set(kept) - set(rewrites))} were tokenized with "
            f"{dataset.tokenizer}, asked for is {fingerprint}. Name their tokenizer (--tokenizer), "
            "or their files again, or --drop"
        )
    remove_leftovers(folder)
    work = temporary_name(folder / "tokenize")
    work.mkdir()
    try:
        sources = _sources(dataset, kept, rewrites, original_csv, join, work, jobs)
        _check_found(dataset, sources, original_csv)
        checksums, counts, unmatched = _write_captions(
            dataset, sources, tokenizer, fingerprint, jobs, ray
        )
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(folder)  # a full disk has no name of its own
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    variants = [source.name for source in sources]
    manifest_libraries = {"laclip": laclip.__version__}
    for library in ("ftfy", "regex", "sentencepiece"):
        manifest_libraries[library] = importlib.metadata.version(library)
    entries = [
        samples_summary(folder / f"{shard.stem}.samples")["shard"] for shard in dataset.shards
    ]
    now = open_dataset(folder)
    own = (tuple(variants), fingerprint, [checksums[shard.name] for shard in dataset.shards])
    same = [s.name for s in now.shards] == [s.name for s in dataset.shards]
    same = same and (not now.variants or _captions_of(now) in (_captions_of(dataset), own))
    if not same or not write_manifest(
        folder, entries, checksums, variants, fingerprint, manifest_libraries
    ):
        raise ValueError(
            f"{folder}: another process changed it meanwhile. Run laclip tokenize again"
        )
    (folder / JOURNAL).unlink(missing_ok=True)
    return _report(folder, dataset.num_samples, sources, counts, unmatched)


def _captions_of(dataset):
    """What dataset.json says of captions."""
    return dataset.variants, dataset.tokenizer, [s.captions_checksum for s in dataset.shards]


def _sources(dataset, kept, rewrites, original_csv, join, work: Path, jobs: int) -> list[Source]:
    """The variants in their order; reads and checks every file of rewrites."""
    sources = [Source("original", "txt")]
    files = {}  # position in sources: arguments of _build
    for name in [*kept, *(name for name in rewrites if name not in kept)]:
        if name not in rewrites:
            sources.append(Source(name, "keep", old=dataset.variants.index(name)))
        elif str(rewrites[name]).startswith("json:"):
            sources.append(Source(name, "json", str(rewrites[name]).removeprefix("json:")))
        else:
            place = work / str(len(sources))
            files[len(sources)] = (place, Path(rewrites[name]), original_csv, join)
            by_key = Path(rewrites[name]).suffix in (".jsonl", ".csv", ".parquet")
            sources.append(Source(name, "store", str(place), 0, "key" if by_key else join))
    checksums = run_shards(
        _build,
        files.values(),
        total=len(files),
        label="read rewrites",
        unit="files",
        jobs=jobs,
        weigh=lambda result: (result[1], "texts"),
    )
    for number, (checksum, _) in zip(files, in_order(checksums), strict=True):
        sources[number] = replace(sources[number], checksum=checksum)
    return sources


def _check_found(dataset, sources: list[Source], original_csv: Path | None) -> None:
    """Rewrites of other samples than these would leave training with the originals alone."""
    compared = False
    for source in sources:
        if source.kind not in ("store", "json"):
            continue
        shards = (s for s in dataset.shards if has_texts(dataset.path, s, source))
        shard = next(shards, None)
        if shard is None and source.kind == "json":
            raise ValueError(
                f"--rewrites {source.name}=json:{source.place}: no KEY.json of {dataset.path} has "
                "a text in that field"
            )
        if shard is None:
            own = open_texts(dataset.path, dataset.shards[0]).identities(source.identity)[0]
            raise ValueError(
                f"--rewrites {source.name}: no sample of {dataset.path} finds a text by its "
                f"{source.identity}. The first sample's is {(own and own[:80])!r}, the first "
                f"text's {TextStore(Path(source.place)).identity(0)[:80]!r}"
                + (
                    ": laclip pack did not make these tars. Say --join caption"
                    if own is None and source.identity in ("row", "path")
                    else ""
                )
            )
        if source.identity in ("row", "path") and not compared:
            _check_captions(dataset, shard, source.identity, original_csv)
            compared = True


def _check_captions(dataset, shard, join: str, original_csv) -> None:
    """Numbers and paths fit any list; the captions tell whether it is the one of these tars."""
    texts = open_texts(dataset.path, shard)
    captions = dict(zip(texts.identities(join), texts.identities("caption"), strict=True))
    captions.pop(None, None)
    compared, different = 0, []
    for row, (image, caption) in enumerate(read_pairs(original_csv)):
        own = captions.pop(str(row) if join == "row" else image, None)
        if own is not None:
            compared += 1
            if own != squeeze(caption):
                different.append(f"row {row} is {squeeze(caption)[:80]!r}, its sample {own[:80]!r}")
        if not captions:
            break
    if 2 * len(different) > compared:
        raise ValueError(
            f"{original_csv}: not the list of {dataset.path}: {len(different)} of the {compared} "
            f"captions compared differ ({different[0]}), so rewrites would go to wrong images. "
            "Name the list that was packed or numbered, or use --join caption"
        )


def _build(place: Path, path: Path, original_csv: Path | None, join: str) -> tuple[int, int]:
    checksum, count = build_store(place, read_rewrites(path, original_csv, join))
    if count == 0:
        raise ValueError(f"{path}: no rewrites in it")
    return checksum, count


def _write_captions(dataset, sources, tokenizer, fingerprint, jobs, ray):
    """Run the shards that are left.

    Returns the checksum of each shard's file; of every variant the counts; and how many of its
    rewrites no sample took, with lines about them.
    """
    seen = [(s.name, s.kind, s.old, s.identity, s.checksum) for s in sources]
    fields = [s.place for s in sources if s.kind == "json"]
    old = (
        [s.captions_checksum for s in dataset.shards]
        if any(s.kind == "keep" for s in sources)
        else []
    )
    plan = checksum_hex(json.dumps([RULES, MAX_TOKENS, fingerprint, seen, fields, old]).encode())
    done = _read_journal(dataset.path / JOURNAL, plan)
    tasks = [
        (dataset.path, shard, sources, tokenizer, plan, done.get(shard.name))
        for shard in dataset.shards
    ]
    results = run_shards(
        tokenize_shard,
        tasks,
        total=len(tasks),
        label="tokenize",
        jobs=jobs,
        ray=ray,
        weigh=lambda result: (result[3], "captions"),
    )
    counts = [VariantCount() for _ in sources]
    used: list[np.ndarray | None] = [
        np.zeros(len(TextStore(Path(s.place))), bool) if s.kind == "store" else None
        for s in sources
    ]
    checksums, takers = {}, [0 for _ in sources]
    for number, (checksum, shard_counts, found, _) in results:
        checksums[dataset.shards[number].name] = checksum
        for total, count in zip(counts, shard_counts, strict=True):
            total.add(count)
        for i, (mask, numbers) in enumerate(zip(used, found, strict=True)):
            if mask is not None:
                mask[numbers] = True
                takers[i] += len(numbers)
    unmatched = [_unmatched(*of) for of in zip(sources, used, takers, strict=True)]
    return checksums, counts, unmatched


def _unmatched(
    source: Source, used: np.ndarray | None, takers: int
) -> tuple[int | None, list[str]]:
    """How many texts of a store no sample took, and lines for the report.

    used: which texts were taken; takers: by how many samples.
    """
    if used is None:
        return None, []
    notes = []
    if shared := takers - np.count_nonzero(used):
        notes.append(
            f"  {source.name}: {shared} samples have the text of another, as they have its "
            f"{source.identity}"
        )
    store = TextStore(Path(source.place))
    again = store.repeated()
    again = np.sort(again[~used[again]])
    used[again] = True
    left = np.flatnonzero(~used)
    if len(left):
        first = store.identity(int(left[0]))[:80]
        shown = f"row {first}" if source.identity == "row" else repr(first)
        notes.append(f"  {source.name}: no sample for the rewrite of {shown}")
    if len(again):
        first = store.identity(int(again[0]))[:80]
        notes.append(
            f"  {source.name}: {len(again)} texts not used, as their {source.identity} has an "
            f"earlier one (first: {first!r})"
        )
    return len(left), notes


def _read_journal(path: Path, plan: str) -> dict[str, tuple[str, int]]:
    """Shard -> what an earlier run of the same plan wrote for it (`tokenize_shard`'s `done`)."""
    if not path.exists():
        return {}
    lines = path.read_bytes().decode(errors="replace").splitlines()
    fields = [line.split("\t") for line in lines]
    return {
        name: (checksum, int(broken))
        for own, name, checksum, broken, end in (f for f in fields if len(f) == 5)
        if own == plan and end == "."
    }


def _report(folder: Path, samples: int, sources, counts, unmatched) -> str:
    head = ["variant", "missing", "short", f">{CONTEXT_TOKENS}", "not UTF-8", "unmatched"]
    rows = [[*head, *LENGTHS]]
    notes = []
    for source, count, (left, lines_of) in zip(sources, counts, unmatched, strict=True):
        numbers = [count.missing, count.short, count.over_context, count.not_utf8]
        shown = "" if left is None else str(left)
        rows.append([source.name, *map(str, numbers), shown, *map(str, count.lengths)])
        notes += lines_of
    lines = [
        f"{folder}: {samples} samples x {len(sources)} variants",
        *aligned(rows),
        "  (short: of fewer than two words; unmatched: rewrites that no sample took; the last "
        "columns count captions by tokens)",
    ]
    return "\n".join([*lines, *notes, f"Next: laclip verify {shlex.quote(str(folder))}"])
