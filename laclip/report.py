"""One HTML page of a run: scores, curves, held-out images with the captions found for them."""

import argparse
import html
import io
import json
import math
import tomllib
from array import array
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from laclip.checkpoint import main_score
from laclip.metrics import duration, read_metrics
from laclip.whole_files import whole_file

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2a9d5c; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; width: 100% } td, th { padding: .35rem .7rem }
td, th { text-align: right; border-bottom: 1px solid var(--soft) }
td:first-child, th:first-child, td.left, th.left { text-align: left }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1rem }
.curves svg { width: 100%; height: auto; background: #fff; border-radius: 6px }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem }
.card { display: flex; gap: .8rem }
.card img { width: 72px; height: 72px; background: #fff; object-fit: contain }
.card ol { margin: .3rem 0 0; padding-left: 1.2rem; font-size: .85rem } .hit { color: var(--good);
font-weight: 600 } .soft { opacity: .7 } pre { background: var(--soft); padding: 1rem }
pre { overflow: auto; border-radius: 6px; font-size: .8rem } .caption { font-weight: 600 }
"""

_CURVES = (  # key of the metrics, title, whether one value a step is too noisy to read
    ("loss", "Loss", True),
    ("images_per_second", "Images a second", True),
    ("mfu_padded", "Share of the GPU's peak (MFU, padded captions)", True),
    ("lr", "Learning rate", False),
    ("logit_scale", "Logit scale", False),
    ("gradient_norm", "Gradient norm", True),
    ("data_wait", "Share of the time spent waiting for data", True),
)


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from the run's own files; returns its path."""
    page = folder / "report.html"
    text = render_report(folder)
    with whole_file(page) as file:
        file.write(text.encode())
    return page


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """The held-out scores as lines of text."""
    lines = [f"  {'set':18}{'measure':26}{'score':>8}{'at 5':>8}{'chance':>9}{'n':>7}"]
    for name, score in scores.items():
        first, fifth, measure = _measure(score)
        lines.append(
            f"  {name:18}{measure:26}{score[first]:8.1%}{score[fifth]:8.1%}"
            f"{score['chance']:9.2%}{score['n']:7}"
        )
    return "\n".join(lines)


def _measure(score: dict[str, float]) -> tuple[str, str, str]:
    """The keys of a task's score at 1 and at 5, and what it measures."""
    if "recall_at_1" in score:
        return "recall_at_1", "recall_at_5", "text to image, recall at 1"
    kind = "zero-shot" if "mean_per_class" in score else "image to text"
    return "top1", "top5", f"{kind}, top-1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")


def run(args: argparse.Namespace) -> int:
    if not (args.run_folder / "config.toml").is_file():
        raise FileNotFoundError(f"'{args.run_folder}' is no run folder: no config.toml there")
    print(write_report(args.run_folder))
    return 0


class History:
    """What the page shows of metrics.jsonl, whose rows may be millions."""

    def __init__(self, folder: Path):
        self.seconds_a_pair = 0.0  # the sum of all rows
        self.last: dict[str, Any] = {}
        self.steps = array("d")
        self.curves = {key: array("d") for key, *_ in _CURVES}  # NaN where a row has no number
        self.scores: list[tuple[int, dict[str, float]]] = []  # steps done, main score of each task
        self.variants: Counter[str] = Counter()  # sums of their shares
        for record in read_metrics(folder):
            self.last = record
            self.seconds_a_pair += 1 / record["images_per_second"]
            self.steps.append(record["step"])
            for key, values in self.curves.items():
                value = record.get(key)
                values.append(math.nan if value is None else value)
            for name, share in record.get("variants", {}).items():
                self.variants[name] += share
            if "scores" in record:
                self.scores.append((record["step"] + 1, record["scores"]))


def render_report(folder: Path) -> str:
    """The page's text. Missing parts (a run that is not finished) are left out."""
    history = History(folder)
    config = (folder / "config.toml").read_text() if (folder / "config.toml").exists() else ""
    status = _read_json(folder / "status.json")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        f"<title>{html.escape(folder.name)} - laclip</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(folder.name)}</h1>",
        f"<p class=soft>{html.escape(_summary(history, status, config))}</p>",
    ]
    scores = _read_json(folder / "scores.json")
    if scores:
        parts += ["<h2>Held-out scores</h2>", _score_table(scores)]
    if len(history.steps) > 1:
        steps = np.asarray(history.steps)
        figures = "".join(
            _curve(steps, np.asarray(history.curves[curve[0]]), *curve)
            for curve in _CURVES
            if curve[0] in history.last
        )
        figures += _score_curves(history, scores)
        parts += ["<h2>Training</h2>", f"<div class=curves>{figures}</div>"]
        if history.variants:
            parts += ["<h2>Captions drawn</h2>", _variant_table(history)]
    examples = _read_json(folder / "examples.json")
    for name, cards in examples.items():
        parts += [
            f"<h2>{html.escape(name)}: images and the texts nearest to each</h2>",
            f"<div class=gallery>{''.join(map(_card, cards))}</div>",
        ]
    bad = folder / "bad_samples.jsonl"
    if bad.exists():
        with bad.open() as file:
            text, more = "".join(islice(file, 1000)), sum(1 for _ in file)
        text += f"and {more:,} more in {bad.name}" if more else ""
        parts += ["<h2>Bad samples</h2>", f"<pre>{html.escape(text)}</pre>"]
    if config:
        parts += ["<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>"]
    return "\n".join(parts) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    text = path.read_text() if path.exists() else ""
    return json.loads(text) if text else {}  # empty where the machine lost power


def _summary(history: History, status: dict, config: str) -> str:
    texts = [status.get("state", "")]
    if status.get("reason"):
        texts.append(status["reason"])
    if history.steps:
        steps, losses = history.last["step"] + 1, history.curves["loss"]
        batch = tomllib.loads(config)["train"]["global_batch_size"] if config else 0
        # Of the steps that were logged, as if all were like them.
        seconds = steps / len(history.steps) * batch * history.seconds_a_pair
        texts += [
            f"{steps:,} steps of {batch}",
            f"loss {losses[0]:.3f} to {losses[-1]:.3f}",
            f"trained for {duration(seconds)}",
        ]
    if status.get("time"):
        texts.append(status["time"])
    return " · ".join(text for text in texts if text)


def _score_table(scores: dict[str, dict[str, float]]) -> str:
    rows = [
        "<tr><th>Set<th class=left>Measure<th>Score<th>At 5<th>Chance<th>Times chance<th>Items</tr>"
    ]
    for name, score in scores.items():
        first, fifth, measure = _measure(score)
        rows.append(
            f"<tr><td>{html.escape(name)}<td class=left>{measure}<td>{score[first]:.1%}"
            f"<td>{score[fifth]:.1%}<td>{score['chance']:.2%}"
            f"<td>{score[first] / score['chance']:.0f}<td>{score['n']:,}</tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _variant_table(history: History) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name)}<td>{total / len(history.steps):.1%}</tr>"
        for name, total in history.variants.items()
    )
    return f"<table><tr><th>Variant<th>Share</tr>{rows}</table>"


def _score_curves(history: History, scores: dict[str, dict]) -> str:
    """The main score of each held-out task, where the run was scored on its way."""
    scored = list(history.scores)
    if scored and scores:
        end = {name: main_score(score) for name, score in scores.items()}
        scored.append((history.last["step"] + 1, end))
    figures = ""
    for name in dict.fromkeys(name for _, values in scored for name in values):
        points = np.array([(step, values[name]) for step, values in scored if name in values])
        figures += _curve(points[:, 0], points[:, 1], "score", f"Held-out score: {name}", False)
    return figures


def _curve(steps: np.ndarray, values: np.ndarray, key: str, title: str, noisy: bool) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        *_thinned(steps, values),
        color="#9db8d6" if noisy else "#1f5fa8",
        linewidth=1,
        marker="." if len(steps) < 40 else "",
    )
    if noisy:
        axes.plot(*_thinned(steps, _smooth(values)), color="#1f5fa8", linewidth=1.6)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if key in ("images_per_second", "data_wait"):
        axes.set_ylim(bottom=0)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each of 1000 columns the lowest and the highest value: what a picture shows of them all.

    A column without any number keeps its gap.
    """
    columns = np.searchsorted(steps, np.linspace(steps[0], steps[-1], 1001)[1:-1])
    low, high = (np.where(np.isfinite(values), values, sign * np.inf) for sign in (1, -1))
    kept = {0, len(steps) - 1}
    for part in filter(len, np.split(np.arange(len(steps)), columns)):
        kept |= {part[low[part].argmin()], part[high[part].argmax()]}
    order = sorted(kept)
    return steps[order], values[order]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a centred window of a twentieth of the run; steps that were skipped have NaN."""
    half, index, found = max(1, len(values) // 40), np.arange(len(values)), np.isfinite(values)
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    totals, counts = (
        np.insert(np.cumsum(part), 0, 0.0) for part in (np.where(found, values, 0.0), found)
    )
    with np.errstate(invalid="ignore"):  # a window without any number
        return (totals[last] - totals[first]) / (counts[last] - counts[first])


def _card(example: dict[str, Any]) -> str:
    items = "".join(
        f"<li{' class=hit' if text == example['caption'] else ''}>{html.escape(text)} "
        f"<span class=soft>{value:.2f}</span></li>"
        for text, value in example["nearest"]
    )
    return (
        f'<div class=card><img alt="" src="data:image;base64,{example["image"]}"><div>'
        f"<span class=caption>{html.escape(example['caption'])}</span><ol>{items}</ol></div></div>"
    )
