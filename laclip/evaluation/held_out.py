"""Scores on held-out datasets while training: images against texts, texts against images."""

import base64
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from laclip.config import DataConfig, TaskConfig
from laclip.dataset import BAD, CAPTION_MISSING, Dataset, open_dataset
from laclip.evaluation.features import BATCHES_IN_FLIGHT, Encode, encode_images, encode_texts
from laclip.images import ImagePipeline
from laclip.parallel import Ranks, from_first
from laclip.tokenizer import Tokenizer


class HeldOutSet:
    """A dataset as an evaluation task sees it: its good images and their distinct captions.

    samples: (shard, index) of every image that is not flagged and has a caption. token_ids: int32
    `[texts, context_length]`, the distinct original captions. text_of: `[images]`, which caption
    belongs to each image.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, context_length: int):
        dataset.check_tokenizer(tokenizer.fingerprint)
        self.dataset = dataset
        self.samples: list[tuple[int, int]] = []
        self.texts: list[str] = []
        number_of: dict[tuple[int, ...], int] = {}
        text_of = []
        start = [] if tokenizer.sot_token is None else [tokenizer.sot_token]
        for shard in range(len(dataset.shards)):
            captions = dataset.captions(shard)
            for index, record in enumerate(dataset.samples(shard).records):
                if record["flags"] & BAD or captions.flags(index, 0) & CAPTION_MISSING:
                    continue
                tokens = tuple(int(token) for token in captions.tokens(index, 0))
                tokens = tokens[: context_length - len(start) - 1]
                if tokens not in number_of:
                    number_of[tokens] = len(number_of)
                    self.texts.append(tokenizer.decode(list(tokens)).strip())
                self.samples.append((shard, index))
                text_of.append(number_of[tokens])
        if not self.samples:
            raise ValueError(f"'{dataset.path}' holds no image that can be evaluated")
        self.text_of = torch.tensor(text_of)
        shape = len(number_of), context_length
        self.token_ids = np.full(shape, tokenizer.pad_token, np.int32)
        for row, tokens in zip(self.token_ids, number_of):
            row[: len(start) + len(tokens) + 1] = (*start, *tokens, tokenizer.eot_token)

    def encoded_image(self, number: int) -> np.ndarray:
        """The encoded bytes of image `number`, uint8."""
        shard, index = self.samples[number]
        record = self.dataset.samples(shard).records[index]
        path = self.dataset.path / self.dataset.shards[shard].name
        with path.open("rb") as file:
            file.seek(int(record["offset"]))
            return np.frombuffer(file.read(int(record["bytes"])), np.uint8)


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
    Both: `chance` of the first, `n` items, `undecodable` images left out. examples: at most 12
    evenly spaced images with the five captions nearest to each, the encoded image in base64.
    """
    held_out = HeldOutSet(open_dataset(task.data), tokenizer, context_length)
    pipeline = ImagePipeline(
        batch_size=batch_size,
        image_size=image_size,
        interpolation=data.interpolation,
        normalize=data.normalize,
        train=False,
        device=ranks.device,
        threads=data.decode_threads,
        depth=BATCHES_IN_FLIGHT,
        exif_rotation=data.exif_rotation,
    )
    image_features, undecodable = encode_images(
        held_out.encoded_image, len(held_out.samples), encode_image, pipeline, batch_size, ranks
    )
    text_features = encode_texts(held_out.token_ids, encode_text, batch_size, ranks)
    kept = torch.ones(len(held_out.samples), dtype=torch.bool)
    kept[list(undecodable)] = False
    image_features = image_features[kept]
    scores: dict[str, float] = {}
    examples: list[dict[str, Any]] = []
    if ranks.is_first:
        scores, examples = _judge(task, held_out, image_features, text_features, kept)
        scores["undecodable"] = len(undecodable)
    # One rank's, as all act on them: two kinds of CPU can break a tie in two ways.
    return (from_first(scores) if dist.is_initialized() else scores), examples


def _judge(
    task: TaskConfig,
    held_out: HeldOutSet,
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    kept: torch.Tensor,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores and examples; kept: `[images]`, which of the set's have features."""
    text_of = held_out.text_of[kept]
    similarity = image_features @ text_features.T
    if task.direction == "image_to_text":
        scores = image_to_text(similarity, text_of)
    else:
        scores = text_to_image(similarity, text_of)
    numbers = torch.arange(len(kept))[kept]
    examples = []
    for row in torch.linspace(0, len(numbers) - 1, min(12, len(numbers))).long().tolist():
        values, nearest = similarity[row].topk(min(5, len(held_out.texts)))
        image = held_out.encoded_image(int(numbers[row]))
        examples.append(
            {
                "image": base64.b64encode(image.tobytes()).decode(),
                "caption": held_out.texts[int(text_of[row])],
                "nearest": [
                    [held_out.texts[text], round(value, 4)]
                    for text, value in zip(nearest.tolist(), values.tolist())
                ],
            }
        )
    return scores, examples


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
