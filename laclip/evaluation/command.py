"""Scores of a trained model on data of your own or the field's.

laclip evaluate MODEL zero-shot DATA
laclip evaluate MODEL retrieval DATA
laclip evaluate MODEL linear-probe TRAIN TEST
laclip evaluate MODEL few-shot DATA
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from laclip.checkpoint import add_checkpoint_option
from laclip.config import add_set_option
from laclip.evaluation.probe import few_shot, linear_probe
from laclip.evaluation.retrieval import RECALLS, retrieval
from laclip.evaluation.trained import TrainedModel
from laclip.evaluation.zero_shot import zero_shot
from laclip.whole_files import whole_file

SHARES = {  # what is printed as a percentage, in this order
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "chance": "chance",
}
EPISODES = {  # options of few-shot: default, meaning
    "ways": (5, "classes an episode"),
    "shots": (5, "known images a class"),
    "queries": (15, "images a class whose class is asked for"),
    "episodes": (600, "how many"),
    "seed": (0, "what the episodes are drawn from"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score a trained model. One process, on the GPU where there is one; images and precision "
        "as in the run's configuration. docs/evaluation.md tells what every number means."
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a run's folder: config.toml and model.pt, or with --checkpoint its checkpoints",
    )
    tasks = parser.add_subparsers(metavar="TASK", required=True, dest="task")

    def task(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        found = tasks.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}"
        )
        add_checkpoint_option(found)
        found.add_argument("--out", type=Path, metavar="JSON", help="write all scores there")
        add_set_option(found, "evaluation.batch_size=512 train.precision=fp32")
        return found

    labelled = (
        "a folder with one folder of images a class, or with webdataset tars of KEY.jpg (or png, "
        "webp) and KEY.cls, as CLIP_benchmark publishes them"
    )
    classes = task(
        "zero-shot",
        "classification by the names of the classes",
        "Names: --classnames; else ImageNet's where the folders are WordNet ids; else "
        "classnames.txt in DATA or the folder above; else the folders' names, which must not be "
        "numbers then.",
    )
    classes.add_argument("data", type=Path, metavar="DATA", help=labelled)
    classes.add_argument(
        "--classnames",
        metavar="FILE|imagenet",
        help="one name a line, in the classes' order; imagenet: its 1,000 names in its order, for "
        "folders or .cls of numbers",
    )
    classes.add_argument(
        "--templates",
        metavar="simple|openai|FILE",
        help="simple: the 7 that LaCLIP takes for CC3M, CC12M and RedCaps; openai: the 80 that it "
        "takes for LAION-400M; a file: one a line, {} for the name (default: "
        "zeroshot_classification_templates.txt in DATA or the folder above, else simple)",
    )
    both = task("retrieval", "texts found by images, and images by texts")
    both.add_argument(
        "data",
        type=Path,
        metavar="DATA",
        help="a laclip dataset (its original captions), or a folder with webdataset tars of "
        "KEY.jpg (or png, webp) and KEY.txt, one caption a line, as CLIP_benchmark publishes them",
    )
    features = "logistic regression on the image features before the projection"
    probe = task(
        "linear-probe",
        features,
        "C is chosen on a fifth of the training images, then all of them are fitted.",
    )
    probe.add_argument("train", type=Path, metavar="TRAIN", help=labelled)
    probe.add_argument("test", type=Path, metavar="TEST", help="the same, of the same classes")
    few = task("few-shot", f"episodes of a few classes and images: {features}")
    few.add_argument("data", type=Path, metavar="DATA", help=labelled)
    for option, (default, meaning) in EPISODES.items():
        few.add_argument(
            f"--{option}", type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )


def run(args: argparse.Namespace) -> int:
    if args.out is not None:
        _check_writable(args.out)
    model = TrainedModel(args.model, args.set, args.checkpoint)
    if args.task == "zero-shot":
        scores = zero_shot(model, args.data, args.classnames, args.templates)
    elif args.task == "retrieval":
        scores = retrieval(model, args.data)
    elif args.task == "linear-probe":
        scores = linear_probe(model, args.train, args.test)
    else:
        options = {name: getattr(args, name) for name in EPISODES}
        scores = few_shot(model, args.data, **options)
    name = args.model if args.checkpoint is None else model.source
    scores = {"model": str(name), "task": args.task, **scores}
    lines = [table(scores)]
    if args.out is not None:
        # A file's name may hold bytes that are no text; JSON has the same escapes for them.
        text = json.dumps(scores, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
        with whole_file(args.out) as file:
            file.write(text + b"\n")
        lines.append(f"all scores: '{args.out}'")
    encoding = sys.stdout.encoding
    print("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))
    return 0


def _check_writable(out: Path) -> None:
    """Where scores could not be written is told before the work."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out: there is no folder '{out.absolute().parent}'")
    if out.is_dir():
        raise ValueError(f"--out: '{out}' is a folder, expected a file's name")
    temporary = out.with_name(out.name + ".partial")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise ValueError(f"--out: '{out}' cannot be written: {error.strerror}") from None


def table(scores: dict[str, Any]) -> str:
    """What a person reads: what was done, the scores, and what could not be scored."""
    lines = [f"{scores['task']} of '{scores['model']}' on '{scores['data']}'"]
    if "templates" in scores:
        lines.append(
            f"{scores['classes']:,} classes, names: {scores['classnames']}; "
            f"{scores['templates_count']} templates: {scores['templates']}"
        )
    if "trained_on" in scores:
        lines.append(
            f"{scores['classes']:,} classes, {scores['training']['n']:,} training images in "
            f"'{scores['trained_on']}', C = {scores['c']:.3g}"
            + ("" if scores["converged"] else "; stopped at the limit of iterations")
        )
    if "ways" in scores:
        lines.append(
            f"{scores['episodes']:,} episodes of {scores['ways']} classes out of "
            f"{scores['classes']:,}, {scores['shots']} known and {scores['queries']} asked for of "
            "each"
        )
    for key, title in SHARES.items():
        if key in scores:
            lines.append(f"  {title:24}{scores[key]:9.2%}")
            if key == "top1" and "interval_95" in scores:
                lines[-1] += f" ± {scores['interval_95']:.2%} (95 %)"
    for way in ("image_to_text", "text_to_image"):
        if way in scores:
            recalls = [f"{scores[way][f'recall_at_{at}']:8.2%} at {at}" for at in RECALLS]
            recalls.append(f"{scores[way]['chance']:8.2%} chance at 1")
            lines.append(f"  {way.replace('_', ' '):24}" + " ".join(recalls))
    if "texts" in scores:
        lines.append(f"  {'texts':24}{scores['texts']:9,}")
    lines += _counts(scores)
    if "training" in scores:
        lines += ["of the training images:", *_counts(scores["training"])]
    return "\n".join(lines)


def _counts(counts: dict[str, Any]) -> list[str]:
    lines = [f"  {'images':24}{counts['n']:9,}"]
    broken, ignored = counts["undecodable_images"], counts["ignored_files"]
    if counts["flagged"]:
        lines.append(f"  {'left out: bad, no caption':24}{counts['flagged']:9,}")
    if broken:
        lines.append(f"  {'left out, do not decode':24}{len(broken):9,}")
        lines += [f"    {name}: {reason}" for name, reason in list(broken.items())[:5]]
    if ignored:
        more = ", ..." if len(ignored) > 1 else ""
        lines.append(f"  {'files that are no images':24}{len(ignored):9,}: {ignored[0]}{more}")
    return lines
