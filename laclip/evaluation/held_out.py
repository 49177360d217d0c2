"""Scores on held-out data while training: retrieval in a dataset, zero-shot classification."""

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip.config import DataConfig, TaskConfig
from laclip.dataset import BAD, CAPTION_MISSING, Dataset, open_dataset
from laclip.evaluation.data import ImageSet
from laclip.evaluation.features import (
    Encode,
    encode_images,
    encode_texts,
    evaluation_pipeline,
)
from laclip.evaluation.zero_shot import ClassSet
from laclip.parallel import JointError, Ranks, from_first, gather_objects
from laclip.tokenizer import Tokenizer


class HeldOutSet:
    """A dataset as an evaluation task sees it: its good images and their distinct captions.

    images: all that are not flagged and have a caption. texts: the distinct original captions.
    token_ids: theirs, int32 `[texts, context_length]`. text_of: `[images]`, which caption belongs
    to each image.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, context_length: int):
        dataset.check_tokenizer(tokenizer.fingerprint)
        self.images = ImageSet(dataset.path)
        self.texts: list[str] = []
        number_of: dict[tuple[int, ...], int] = {}
        text_of = []
        start = [] if tokenizer.sot_token is None else [tokenizer.sot_token]
        for shard, entry in enumerate(dataset.shards):
            captions, samples = dataset.captions(shard), dataset.samples(shard)
            for index, record in enumerate(samples.records):
                if record["flags"] & BAD or captions.flags(index, 0) & CAPTION_MISSING:
                    continue
                tokens = tuple(int(token) for token in captions.tokens(index, 0))
                tokens = tokens[: context_length - len(start) - 1]
                if tokens not in number_of:
                    number_of[tokens] = len(number_of)
                    self.texts.append(tokenizer.decode(list(tokens)).strip())
                place = dataset.tar_path(shard), int(record["offset"]), int(record["bytes"])
                self.images.names.append(f"{entry.name}/{samples.key(index)}")
                self.images.places.append(place)
                text_of.append(number_of[tokens])
        self.images.flagged = dataset.num_samples - len(text_of)
        if not text_of:
            raise ValueError(f"'{dataset.path}' holds no image that can be evaluated")
        self.text_of = torch.tensor(text_of)
        shape = len(number_of), context_length
        self.token_ids = np.full(shape, tokenizer.pad_token, np.int32)
        for row, tokens in zip(self.token_ids, number_of):
            row[: len(start) + len(tokens) + 1] = (*start, *tokens, tokenizer.eot_token)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Puts a task's name before the errors of what can be wrong with its data."""
    where = f"evaluation.tasks.{name}"
    try:
        yield
    except JointError as error:
        raise JointError(f"{where}: {error}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error


def check_task(task: TaskConfig, tokenizer: Tokenizer) -> None:
    """Raises FileNotFoundError or ValueError for a task whose data cannot be scored."""
    if not task.data:
        raise ValueError("data: found none, expected a folder. Set it")
    if task.direction == "zero_shot":
        _classes(task)
    else:
        open_dataset(task.data).check_tokenizer(tokenizer.fingerprint)


def _classes(task: TaskConfig) -> ClassSet:
    return ClassSet(Path(task.data), task.classnames or None, task.templates or None)


def evaluate(
    task: TaskConfig,
    encode_image: Encode,
    encode_text: Encode,
    tokenizer: Tokenizer,
    data: DataConfig,
    *,
    image_size: int,
    context_length: int,
    batch_size: int,
    ranks: Ranks,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Score a task on all ranks together.

    Returns (scores, examples), the examples on the first rank alone. image_to_text: `top1` and
    `top5` over images, the candidates being the set's distinct captions. text_to_image:
    `recall_at_1` and `recall_at_5` over distinct captions, a hit being any image with that caption.
    zero_shot: `top1`, `top5` and `mean_per_class` as `laclip evaluate` gives them. All: `chance` of
    the first, `n` items, `undecodable` images left out. examples: at most 12 evenly spaced images
    with the five captions (or classes) nearest to each, the encoded image in base64.
    """
    pipeline = evaluation_pipeline(data, image_size, batch_size, ranks.device)

    def features_of(images: ImageSet) -> tuple[torch.Tensor, dict[int, str]]:
        count = len(images.places)
        found = encode_images(images.read, count, encode_image, pipeline, batch_size, ranks)
        if len(found[1]) == count:
            raise JointError(
                f"'{task.data}': none of its {count} images decodes; the first: {found[1][0]}. "
                "Bring back whole ones, or remove the task; then go on"
            )
        return found

    def texts_of(token_ids: np.ndarray) -> torch.Tensor:
        return encode_texts(token_ids, encode_text, batch_size, ranks)

    if task.direction == "zero_shot":
        classes = _classes(task)
        images, texts = classes.images, classes.names
        check_alike(task, [images.names, images.labels, texts, classes.templates])
        features, undecodable = features_of(images)
        text_features = classes.encode(
            lambda prompts: texts_of(tokenizer.encode_batch(prompts, context_length))
        )
        text_of = torch.tensor(images.labels)
    else:
        dataset = open_dataset(task.data)
        check_alike(task, dataset.fingerprint)
        held_out = HeldOutSet(dataset, tokenizer, context_length)
        images, texts, text_of = held_out.images, held_out.texts, held_out.text_of
        features, undecodable = features_of(images)
        text_features = texts_of(held_out.token_ids)
    scores: dict[str, float] = {}
    examples: list[dict[str, Any]] = []
    if ranks.is_first:
        numbers = [n for n in range(len(text_of)) if n not in undecodable]
        kept = torch.tensor(numbers, dtype=torch.int64)
        if task.direction == "zero_shot":
            scores = classes.score(features, text_features, undecodable, ranks.device)
            del scores["per_class"]
            scores["n"] = len(kept)
        else:
            similarity = features[kept] @ text_features.T
            judge = image_to_text if task.direction == "image_to_text" else text_to_image
            scores = judge(similarity, text_of[kept])
        scores["undecodable"] = len(undecodable)
        shown = torch.linspace(0, len(kept) - 1, min(12, len(kept))).long()
        for number in kept[shown].tolist():
            values, nearest = (text_features @ features[number]).topk(min(5, len(texts)))
            examples.append(
                {
                    "image": base64.b64encode(images.read(number).tobytes()).decode(),
                    "caption": texts[int(text_of[number])],
                    "nearest": [
                        [texts[text], round(value, 4)]
                        for text, value in zip(nearest.tolist(), values.tolist())
                    ],
                }
            )
    # One rank's, as all act on them: two kinds of CPU can break a tie in two ways.
    return (from_first(scores) if dist.is_initialized() else scores), examples


def check_alike(task: TaskConfig, content: object) -> None:
    """Raises JointError unless all ranks have the same content, as each encodes a share of it."""
    digest = hashlib.sha256(repr(content).encode(errors="backslashreplace")).hexdigest()
    digests = gather_objects(digest) if dist.is_initialized() else [digest]
    if other := [rank for rank, found in enumerate(digests) if found != digests[0]]:
        raise JointError(
            f"'{task.data}' does not hold the same on all machines: rank {other[0]} finds other "
            "images, names or templates than rank 0. Copy it anew"
        )


def image_to_text(similarity: torch.Tensor, text_of: torch.Tensor) -> dict[str, float]:
    """Scores of images `[images, texts]` whose own texts are `text_of [images]`.

    A text that ties with the right one counts against it, and so does NaN.
    """
    own = similarity.gather(1, text_of[:, None])
    better = (~(similarity < own)).sum(dim=1) - 1
    return {
        "top1": (better < 1).float().mean().item(),
        "top5": (better < 5).float().mean().item(),
        "chance": 1 / similarity.shape[1],
        "n": len(similarity),
    }


def text_to_image(similarity: torch.Tensor, text_of: torch.Tensor) -> dict[str, float]:
    """Scores of texts against `similarity [images, texts]`; a text's best own image counts."""
    own = text_of[:, None] == torch.arange(similarity.shape[1])
    asked = own.any(dim=0)
    best = similarity.masked_fill(~own, -torch.inf).max(dim=0).values
    better = (~(similarity < best) & ~own).sum(dim=0)[asked]
    return {
        "recall_at_1": (better < 1).float().mean().item(),
        "recall_at_5": (better < 5).float().mean().item(),
        "chance": (own.sum(dim=0)[asked].float() / len(similarity)).mean().item(),
        "n": int(asked.sum()),
    }
