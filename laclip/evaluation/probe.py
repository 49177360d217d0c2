"""Linear probe and few-shot: logistic regression on features before the projection."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from laclip.evaluation.data import ImageSet, open_labelled
from laclip.evaluation.features import Progress
from laclip.evaluation.trained import TrainedModel
from laclip.evaluation.zero_shot import counts, per_class

# C from 1e-6 to 1e6, eight steps a decade: first every other decade, then around the best, at half
# the distance each time. As OpenAI's CLIP does.
GRID = range(-48, 49)
STEPS = (16, 8, 4, 2, 1)
HELD_OUT = 0.2  # of the training images of each class, to choose C
MAX_ITERATIONS = 1000
BLOCK_NUMBERS = 2**26  # of the logits, computed at once


def linear_probe(model: TrainedModel, train: Path, test: Path) -> dict[str, Any]:
    """Scores in `test` of a classifier fitted on the images in `train`."""
    known = open_labelled(train)
    asked = open_labelled(test)
    fitted_classes = {known.classes[label] for label in known.labels}  # of numbers some may lack
    strangers = sorted({asked.classes[label] for label in asked.labels} - fitted_classes)
    if strangers:
        raise ValueError(
            f"'{test}': {len(strangers)} of its classes have no image in '{train}': "
            f"{', '.join(strangers[:5])}. Give both the same folders or numbers"
        )
    if len(fitted_classes) < 2:
        raise ValueError(f"'{train}' has images of one class, expected at least two to tell apart")
    number_of = {name: number for number, name in enumerate(known.classes)}
    features, labels, known_broken = _features(model, known, "training images")
    if lost := sorted(set(known.labels) - set(labels.tolist())):
        raise ValueError(f"'{train}': no image of class {known.classes[lost[0]]!r} decodes")
    asked_features, asked_labels, asked_broken = _features(model, asked, "test images")
    asked_labels = torch.tensor([number_of[name] for name in asked.classes])[asked_labels]
    fitted = fit_best(features, labels, len(known.classes), model.device)
    logits = predict(asked_features, fitted["weight"], fitted["bias"])
    hits = logits.argmax(dim=1) == asked_labels
    return {
        "data": str(test),
        "trained_on": str(train),
        "classes": len(known.classes),
        "c": fitted["c"],
        "held_out_accuracy": fitted["held_out_accuracy"],
        "converged": fitted["converged"],
        "top1": hits.double().mean().item(),
        **per_class(hits, asked_labels, known.classes),
        "chance": 1 / len(known.classes),
        **counts(asked, asked_broken),
        "training": counts(known, known_broken),
    }


def few_shot(
    model: TrainedModel,
    path: Path,
    *,
    ways: int,
    shots: int,
    queries: int,
    episodes: int,
    seed: int,
) -> dict[str, Any]:
    """The mean accuracy over episodes: `ways` classes drawn, `shots` images of each known.

    A logistic regression (C = 1) on unit-length features of the known images names the class of
    `queries` others of each. Episodes are drawn from `seed` and the set alone.
    """
    for name, value in (("shots", shots), ("queries", queries), ("ways", ways - 1)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least {2 if name == 'ways' else 1}")
    if episodes < 2:
        raise ValueError("--episodes: expected at least 2, as for an interval")
    images = open_labelled(path)
    _check_enough(images, images.labels, ways, shots, queries)
    features, labels, broken = _features(model, images, "images")
    _check_enough(images, labels.tolist(), ways, shots, queries)
    features = F.normalize(features.double(), dim=1)
    rows = [(labels == label).nonzero()[:, 0] for label in sorted(set(images.labels))]
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("episodes", episodes)
    accuracies = torch.empty(episodes, dtype=torch.float64)
    truth = torch.arange(ways)
    for episode in range(episodes):
        drawn = []
        for number in torch.randperm(len(rows), generator=generator)[:ways].tolist():
            order = torch.randperm(len(rows[number]), generator=generator)[: shots + queries]
            drawn.append(rows[number][order])
        chosen = torch.stack(drawn)
        known, asked = chosen[:, :shots].flatten(), chosen[:, shots:].flatten()
        weight, bias, _ = fit(features[known], truth.repeat_interleave(shots), ways, 1.0)
        named = predict(features[asked], weight, bias).argmax(dim=1)
        hits = named == truth.repeat_interleave(queries)
        accuracies[episode] = hits.double().mean()
        progress.add(1)
    return {
        "data": str(path),
        "classes": len(rows),
        "ways": ways,
        "shots": shots,
        "queries": queries,
        "episodes": episodes,
        "seed": seed,
        "top1": accuracies.mean().item(),
        "interval_95": 1.96 * accuracies.std().item() / episodes**0.5,
        "chance": 1 / ways,
        **counts(images, broken),
    }


def _check_enough(
    images: ImageSet, labels: Sequence[int], ways: int, shots: int, queries: int
) -> None:
    """Raises ValueError where `labels`, of the images that are left, make no episode."""
    found = Counter(labels)
    used = sorted((found[label], images.classes[label]) for label in set(images.labels))
    if ways > len(used):
        raise ValueError(f"'{images.path}' has {len(used)} classes, --ways asks for {ways} of them")
    few = [count for count, _ in used if count < shots + queries]
    if few:
        raise ValueError(
            f"'{images.path}': {len(few)} of its {len(used)} classes have fewer than {shots} + "
            f"{queries} images (--shots + --queries); {used[0][1]!r} has {few[0]}. Ask for fewer, "
            "or leave those classes out"
        )


def fit_best(
    features: torch.Tensor, labels: torch.Tensor, classes: int, device: torch.device
) -> dict[str, Any]:
    """Logistic regression with the C that does best on a held-out part, fitted on all in the end.

    Of several that do as well the smallest C. On a CPU in fp64, on a GPU in fp32. Returns weight
    [classes, dim], bias [classes], c, held_out_accuracy and converged.
    """
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    features, labels = features.to(device, dtype), labels.to(device)
    held_out = _split(labels.cpu()).to(device)
    if not held_out.any():
        raise ValueError("every class has one training image: none can be held out to choose C")
    progress = Progress("values of C", len(GRID[:: STEPS[0]]) + 2 * (len(STEPS) - 1) + 1)
    accuracy: dict[int, float] = {}
    start = None

    def try_out(exponent: int) -> None:
        nonlocal start
        weight, bias, _ = fit(
            features[~held_out], labels[~held_out], classes, 10 ** (exponent / 8), start
        )
        start = weight, bias
        hits = predict(features[held_out], weight, bias).argmax(dim=1) == labels[held_out]
        accuracy[exponent] = hits.double().mean().item()
        progress.add(1)

    for exponent in GRID[:: STEPS[0]]:
        try_out(exponent)
    for step in STEPS[1:]:
        best = max(sorted(accuracy), key=lambda exponent: accuracy[exponent])
        for exponent in (best - step, best + step):
            if exponent in GRID:
                try_out(exponent)
    best = max(sorted(accuracy), key=lambda exponent: accuracy[exponent])
    c = 10 ** (best / 8)
    weight, bias, converged = fit(features, labels, classes, c)
    progress.add(progress.total - progress.done)
    return {
        "weight": weight,
        "bias": bias,
        "c": c,
        "held_out_accuracy": accuracy[best],
        "converged": converged,
    }


def fit(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    c: float,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Multinomial logistic regression by L-BFGS: minimizes |weight|^2 / 2 + c x sum of losses.

    As scikit-learn's LogisticRegression. features: [n, dim], fp32 or fp64; labels: int64 [n].
    Returns weight [classes, dim], bias [classes], and whether it ended before MAX_ITERATIONS and
    twice as many evaluations.
    """
    # Around their mean the features are better conditioned, and as the bias costs nothing the
    # minimum stays where it is.
    mean = features.mean(dim=0)
    if start is None:
        start = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    weight = start[0].clone().requires_grad_()
    bias = (start[1] + start[0] @ mean).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )
    height = max(1, BLOCK_NUMBERS // classes)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / (2 * c * len(features))
        loss.backward()
        loss = loss.detach()
        for rows, own in zip(features.split(height), labels.split(height)):
            logits = F.linear(rows - mean, weight, bias)
            part = F.cross_entropy(logits, own, reduction="sum") / len(features)
            part.backward()
            loss = loss + part.detach()
        return loss

    optimizer.step(objective)
    spent = optimizer.state[weight]
    ended = spent["n_iter"] < MAX_ITERATIONS and spent["func_evals"] < 2 * MAX_ITERATIONS
    weight, bias = weight.detach(), bias.detach()
    return weight, bias - weight @ mean, ended


def predict(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits [n, classes]; on the CPU where features are."""
    rows = features.split(max(1, BLOCK_NUMBERS // len(weight)))
    parts = [F.linear(part.to(weight.device, weight.dtype), weight, bias) for part in rows]
    return torch.cat([part.to(features.device) for part in parts])


def _features(
    model: TrainedModel, images: ImageSet, label: str
) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
    """Features before the projection of the images that decode, their labels, and the others."""
    features, broken = model.encode_images(images, label, projected=False)
    kept = torch.tensor([number for number in range(len(features)) if number not in broken])
    return features[kept], torch.tensor(images.labels)[kept], broken


def _split(labels: torch.Tensor) -> torch.Tensor:
    """Which images are held out: HELD_OUT of each class, at least one, never the only one."""
    generator = torch.Generator().manual_seed(0)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        count = max(1, round(HELD_OUT * len(own))) if len(own) > 1 else 0
        held_out[own[:count]] = True
    return held_out
