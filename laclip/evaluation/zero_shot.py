"""Zero-shot classification: an image is of the class whose prompts are nearest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from laclip.evaluation.data import ImageSet, open_labelled
from laclip.evaluation.prompts import find_class_names, find_templates
from laclip.evaluation.ranking import places, recall
from laclip.evaluation.trained import TrainedModel


def zero_shot(
    model: TrainedModel, path: Path, classnames: str | None, templates: str | None
) -> dict[str, Any]:
    """Scores of the images in `path` among all classes that have a name; see docs/evaluation.md."""
    images = open_labelled(path)
    names, names_source = find_class_names(images, classnames)
    if len(names) < 2:
        raise ValueError(
            f"'{path}' has one class, {names[0]!r}, expected at least two to tell apart"
        )
    prompts, templates_source = find_templates(images, templates)
    classes = class_features(model, names, prompts)
    features, undecodable = model.encode_images(images, "images")
    numbers = torch.tensor([n for n in range(len(images.labels)) if n not in undecodable])
    labels = torch.tensor(images.labels)[numbers]
    found = places(features, classes, torch.stack([numbers, labels], dim=1), model.device)
    return {
        "data": str(path),
        "classes": len(names),
        "classnames": names_source,
        "templates": templates_source,
        "templates_count": len(prompts),
        "top1": recall(found, 1),
        "top5": recall(found, 5),
        **per_class(found < 1, labels, names),
        "chance": 1 / len(names),
        **counts(images, undecodable),
    }


def class_features(
    model: TrainedModel, names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Unit-length features [classes, dim]: the mean over the templates of unit-length features.

    Classes of one name (ImageNet has two pairs) get the very same features.
    """
    distinct = list(dict.fromkeys(names))
    texts = [template.replace("{}", name) for name in distinct for template in templates]
    features = model.encode_texts(texts, "prompts").view(len(distinct), len(templates), -1)
    place = {name: number for number, name in enumerate(distinct)}
    return F.normalize(features.mean(dim=1), dim=-1)[[place[name] for name in names]]


def per_class(hits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The share of hits of every class that has images, and their mean.

    hits: bool [images]; labels: int64 [images]; names: of the classes.
    """
    images = torch.bincount(labels, minlength=len(names))
    shares = torch.bincount(labels, hits.double(), minlength=len(names)) / images
    present = images > 0
    listed = [
        {"class": name, "n": n, "top1": share}
        for name, n, share in zip(names, images.tolist(), shares.tolist())
        if n
    ]
    return {"mean_per_class": shares[present].mean().item(), "per_class": listed}


def counts(images: ImageSet, undecodable: dict[int, str]) -> dict[str, Any]:
    """What was scored and what was not, every image that does not decode by its name."""
    return {
        "n": len(images.places) - len(undecodable),
        "undecodable": len(undecodable),
        "undecodable_images": {images.names[n]: reason for n, reason in undecodable.items()},
        "flagged": images.flagged,
        "ignored_files": images.ignored,
    }
