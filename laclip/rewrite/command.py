"""laclip rewrite: rewrites of captions by a language model.

    laclip rewrite FOLDER OUT --engine openai --server http://localhost:8000/v1 --model NAME
    laclip tokenize FOLDER --rewrites NAME=OUT/rewrites.jsonl

A run that was stopped goes on when it is started again. docs/rewriting.md has recipes.
"""

import argparse
import json
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from laclip.rewrite.captions import CaptionShard, fingerprint, open_captions
from laclip.rewrite.cluster import rewrite_on_ray
from laclip.rewrite.engine import EngineSettings, Request, Sampling, build_engine
from laclip.rewrite.filters import REASONS
from laclip.rewrite.job import (
    Plan,
    locked,
    open_folder,
    read_finished,
    read_lines,
    record_finished,
    rewrite_shards,
)
from laclip.rewrite.page import write_page
from laclip.rewrite.progress import Progress
from laclip.rewrite.prompts import BUILT_IN, load_prompts
from laclip.whole_files import whole_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "captions",
        type=Path,
        help="a dataset's folder, a folder with files of one kind, or a file: .tar (KEY.txt), "
        ".jsonl, .csv, .parquet (key and caption), .txt (lines)",
    )
    parser.add_argument("out", type=Path, help="the run's folder; an unfinished run goes on")
    parser.add_argument(
        "--method",
        choices=("llm", "eda", "backtranslate"),
        default="llm",
        help="llm: a language model (default); the paper's baselines: eda, words changed by "
        "WordNet's synonyms, insertion, swap and deletion; backtranslate, into another language "
        "and back by Apertium or translation models",
    )
    parser.add_argument(
        "--engine",
        choices=("openai", "transformers"),
        default="openai",
        help="openai: servers of OpenAI's protocol (vLLM, llama.cpp, hosted ones); "
        "transformers: a model in this process (default: openai)",
    )
    parser.add_argument(
        "--model",
        default="",
        help="the server's name of the model; for transformers a folder or a .gguf file",
    )
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="such as http://localhost:8000/v1; again for more servers. A key goes into the "
        "environment variable OPENAI_API_KEY",
    )
    parser.add_argument(
        "--prompts",
        default="plain",
        metavar="SET",
        help=f"the example pairs: {', '.join(BUILT_IN)}, or a JSONL file (default: plain)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="ask as a chat, for models tuned on instructions"
    )
    parser.add_argument("--temperature", type=float, default=0.9, help="(default: 0.9)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default: 0.95)")
    parser.add_argument(
        "--max-tokens", type=int, default=77, help="new tokens at most (default: 77)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of examples and sampling (default: 0)")
    parser.add_argument(
        "--reject-invented",
        action="store_true",
        help="reject rewrites with numbers or names that the caption does not have",
    )
    parser.add_argument(
        "--encoder",
        default="",
        metavar="FOLDER",
        help="a sentence encoder that measures how near each rewrite is to its caption in meaning",
    )
    parser.add_argument(
        "--min-similarity",
        type=float,
        metavar="X",
        help="reject rewrites whose similarity (cosine, at most 1) by --encoder is below X",
    )
    parser.add_argument(
        "--in-flight", type=int, default=64, help="requests at a time to each server (default: 64)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="of the engine transformers and of --translators (default: 16)",
    )
    parser.add_argument(
        "--parquet", action="store_true", help="write rewrites.parquet in place of rewrites.jsonl"
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="run the shards on a Ray cluster (RAY_ADDRESS, or a local one); captions and OUT "
        "must be on a file system that every node sees",
    )
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=Path("/usr/share/wordnet"),
        metavar="FOLDER",
        help="for --method eda: WordNet's files (default: Debian's wordnet-base)",
    )
    parser.add_argument(
        "--through",
        default="spa",
        metavar="LANGUAGE",
        help="for --method backtranslate: Apertium's name of it (default: spa, Spanish; "
        "Debian's apertium-eng-spa)",
    )
    parser.add_argument(
        "--translators",
        nargs=2,
        default=[],
        metavar=("THERE", "BACK"),
        help="for --method backtranslate: folders of two translation models of transformers, such "
        "as Marian's opus-mt-en-de and opus-mt-de-en, in place of Apertium",
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="print the prompts of the first N captions (3), ask no model and write nothing",
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    shards = open_captions(args.captions)
    sampling = Sampling(
        load_prompts(args.prompts), args.chat, args.temperature, args.top_p, args.max_tokens
    )
    if args.dry_run is not None:
        _print_prompts(shards, sampling, args.seed, args.dry_run)
        return 0
    job: dict[str, Any] = {
        "format": "laclip-rewrites 1",
        "captions": str(args.captions.resolve()),
        "files": fingerprint(shards),
        "method": args.method,
        "seed": args.seed,
        "reject_invented": args.reject_invented,
        "encoder": args.encoder,
        "min_similarity": args.min_similarity,
    }
    name, prompts = args.method, None
    if args.method == "backtranslate":
        through = [Path(folder).name for folder in args.translators] or [args.through]
        name = " ".join([name, *through])
        job["through"] = args.translators or args.through
    if args.method == "llm":
        job |= _model_settings(args, sampling)
        name = Path(args.model).name if args.engine == "transformers" else args.model
        prompts = sampling.prompts
    plan = Plan(args.out, name, args.seed, prompts, args.reject_invented, args.min_similarity)
    local = args.engine == "transformers"
    settings = EngineSettings(
        args.engine if args.method == "llm" else args.method,
        sampling,
        str(Path(args.model).resolve()) if local else args.model,
        tuple(args.server),
        args.in_flight,
        args.batch_size,
        args.wordnet.resolve(),
        args.through,
        tuple(str(Path(folder).resolve()) for folder in args.translators),
        str(Path(args.encoder).resolve()) if args.encoder else "",
    )
    with locked(args.out):
        open_folder(args.out, job)
        set_aside = _rewrite(shards, plan, settings, args.ray)
        print(_conclude(args.out, shards, set_aside, args.parquet, bool(args.encoder)))
    return 1 if set_aside else 0


def _model_settings(args: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    return {
        "engine": args.engine,
        "model": args.model,
        "prompts": [sampling.prompts.name, sampling.prompts.fingerprint],
        "chat": args.chat,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
    }


def _check(args: argparse.Namespace) -> None:
    if args.method != "llm" and args.dry_run is not None:
        raise ValueError("--dry-run prints prompts, which only --method llm has")
    asks = args.method == "llm" and args.dry_run is None
    if asks and args.engine == "openai" and not args.server:
        raise ValueError("--engine openai needs --server URL, such as http://localhost:8000/v1")
    if args.server and (args.engine == "transformers" or args.method != "llm"):
        raise ValueError("--server belongs to --engine openai")
    if asks and not args.model:
        raise ValueError("--model is missing: a server's name of it, a folder or a .gguf file")
    if args.translators and args.method != "backtranslate":
        raise ValueError("--translators belongs to --method backtranslate")
    if args.min_similarity is not None and not args.encoder:
        raise ValueError("--min-similarity needs --encoder FOLDER, which measures it")
    if args.min_similarity is not None and not -1 <= args.min_similarity <= 1:
        raise ValueError(f"--min-similarity {args.min_similarity}: expected a cosine, -1 to 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2^63 - 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature is at least 0, --top-p above 0 and at most 1")
    for name in ("max_tokens", "in_flight", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is at least 1")


def _rewrite(
    shards: list[CaptionShard], plan: Plan, settings: EngineSettings, ray: bool
) -> list[dict]:
    """Do what earlier runs left; returns the shards that could not be finished."""
    finished = read_finished(plan.folder)
    counts = [shard.count for shard in shards]
    total = None if None in counts else sum(count or 0 for count in counts)
    progress = Progress(total, len(shards))
    for entry in finished.values():
        progress.earlier(entry)
    left = [shard for shard in shards if shard.name not in finished]
    set_aside = []
    if left:
        if ray:
            results = rewrite_on_ray(left, plan, settings)
        else:
            results = rewrite_shards(left, plan, build_engine(settings), progress.answer)
        for result in results:
            if "problem" in result:
                set_aside.append(result)
                continue
            record_finished(plan.folder, result)
            progress.finished(result, answered=not ray)
    progress.close()
    return set_aside


def _merge(folder: Path, done: list[dict], parquet: bool, measured: bool) -> Path:
    """Write the rewrites of finished shards as one file."""
    path = folder / ("rewrites.parquet" if parquet else "rewrites.jsonl")
    parts = [folder / "shards" / f"{entry['shard']}.jsonl" for entry in done]
    with whole_file(path) as out:
        if parquet:
            import pyarrow
            import pyarrow.parquet

            names = ("key", "text", "source", "model", "prompts")
            fields = [(name, pyarrow.string()) for name in names] + [("seed", pyarrow.int64())]
            fields += [("similarity", pyarrow.float32())] if measured else []
            schema = pyarrow.schema(fields)
            with pyarrow.parquet.ParquetWriter(out, schema, compression="zstd") as writer:
                for part in parts:
                    entries = (entry for entry, _ in read_lines(part))
                    while rows := list(islice(entries, 100_000)):
                        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        else:
            for part in parts:
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
    return path


def _conclude(
    folder: Path, shards: list[CaptionShard], set_aside: list[dict], parquet: bool, measured: bool
) -> str:
    """Write what a run ends with; returns the counts as text."""
    finished = read_finished(folder)
    done = [finished[shard.name] for shard in shards if shard.name in finished]
    merged = _merge(folder, done, parquet, measured)
    with whole_file(folder / "set_aside.json") as out:
        out.write(json.dumps(set_aside, indent=2).encode() + b"\n")
    page = write_page(folder, done)
    captions = sum(entry["captions"] for entry in done)
    accepted = sum(entry["accepted"] for entry in done)
    lines = [
        f"{folder}: {accepted} rewrites of {captions} captions "
        f"({accepted / max(captions, 1):.1%}), {len(done)} of {len(shards)} shards"
    ]
    for reason, meaning in REASONS.items():
        count = sum(entry["rejected"].get(reason, 0) for entry in done)
        if count:
            lines.append(f"  {count:8} rejected, {reason}: {meaning}")
    twice = sum(entry["duplicate_keys"] for entry in done)
    if twice:
        lines.append(f"  {twice:8} captions left out: a key that its file had before")
    for result in set_aside:
        lines.append(f"  set aside: {result['shard']}: {result['problem']}")
    if set_aside:
        lines.append("  Run the same command again to try the shards that were set aside.")
    lines.append(f"  samples and figures: {page}")
    if accepted:
        source = shards[0].path.parent
        dataset = str(source) if (source / "dataset.json").is_file() else "FOLDER"
        words = ["laclip", "tokenize", dataset, "--rewrites", f"NAME={merged}"]
        lines.append(f"Next: {shlex.join(words)}")
    return "\n".join(lines)


def _print_prompts(shards: list[CaptionShard], sampling: Sampling, seed: int, count: int) -> None:
    captions = (item for shard in shards for item in shard.read())
    for number, (key, caption) in enumerate(islice(captions, count)):
        examples, caption_seed = sampling.prompts.draw(key, seed)
        prompt = sampling.prompt(Request(None, number, key, caption, examples, caption_seed))
        shown = prompt if isinstance(prompt, str) else json.dumps(prompt, indent=2)
        sys.stdout.write(f"--- {key} (seed {caption_seed})\n{shown}\n")
