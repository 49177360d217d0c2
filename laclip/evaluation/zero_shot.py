"""Zero-shot classification: an image is of the class whose prompts are nearest."""

from collections.abc import Callable, Container, Sequence
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
    classes = ClassSet(path, classnames, templates)
    class_features = classes.encode(lambda texts: model.encode_texts(texts, "prompts"))
    features, undecodable = model.encode_images(classes.images, "images")
    return {
        "data": str(path),
        "classes": len(classes.names),
        "classnames": classes.names_source,
        "templates": classes.templates_source,
        "templates_count": len(classes.templates),
        **classes.score(features, class_features, undecodable, model.device),
        **counts(classes.images, undecodable),
    }


class ClassSet:
    """Images with a class each, and the names and templates that make the classes' prompts.

    Raises FileNotFoundError and ValueError for what cannot be scored.
    """

    def __init__(self, path: Path, classnames: str | None = None, templates: str | None = None):
        self.images = open_labelled(path)
        self.names, self.names_source = find_class_names(self.images, classnames)
        if len(self.names) < 2:
            raise ValueError(
                f"'{path}' has one class, {self.names[0]!r}, expected at least two to tell apart"
            )
        self.templates, self.templates_source = find_templates(self.images, templates)

    def encode(self, encode_texts: Callable[[Sequence[str]], torch.Tensor]) -> torch.Tensor:
        """Unit-length features [classes, dim]: the mean over the templates of unit-length features.

        Classes of one name (ImageNet has two pairs) get the very same features.
        """
        distinct = list(dict.fromkeys(self.names))
        texts = [text.replace("{}", name) for name in distinct for text in self.templates]
        features = encode_texts(texts).view(len(distinct), len(self.templates), -1)
        place = {name: number for number, name in enumerate(distinct)}
        return F.normalize(features.mean(dim=1), dim=-1)[[place[name] for name in self.names]]

    def score(
        self,
        features: torch.Tensor,
        class_features: torch.Tensor,
        undecodable: Container[int],
        device: torch.device,
    ) -> dict[str, Any]:
        """Scores of all images [images, dim] that decode; the products are made on `device`."""
        kept = [n for n in range(len(self.images.labels)) if n not in undecodable]
        numbers = torch.tensor(kept, dtype=torch.int64)
        labels = torch.tensor(self.images.labels)[numbers]
        found = places(features, class_features, torch.stack([numbers, labels], dim=1), device)
        return {
            "top1": recall(found, 1),
            "top5": recall(found, 5),
            **per_class(found < 1, labels, self.names),
            "chance": 1 / len(self.names),
        }


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
