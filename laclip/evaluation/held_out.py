"""Scores on held-out datasets while training: images against texts, texts against images."""

import base64
from typing import Any

import numpy as np
import torch

from laclip.config import DataConfig, TaskConfig
from laclip.dataset import Dataset, open_dataset
from laclip.evaluation.features import BATCHES_IN_FLIGHT, Encode, encode_images, encode_texts
from laclip.evaluation.ranking import places, recall
from laclip.images import ImagePipeline
from laclip.parallel import Ranks
from laclip.tokenizer import Tokenizer


class HeldOutSet:
    """A dataset as an evaluation task sees it: its good images and their distinct captions.

    samples: (shard, index) of every image that is not flagged. token_ids: int32
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
                if record["flags"] & 1:  # bad
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

    Returns (scores, examples). image_to_text: `top1` and `top5` over images, the candidates being
    the set's distinct captions. text_to_image: `recall_at_1` and `recall_at_5` over distinct
    captions, a hit being any image with that caption. Both: `chance` of the first, `n` items,
    `undecodable` images left out. examples: at most 12 evenly spaced images with the five captions
    nearest to each, the encoded image in base64.
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
    kept = torch.tensor(
        [n for n in range(len(held_out.samples)) if n not in undecodable], dtype=torch.int64
    )
    image_features, text_of = image_features[kept], held_out.text_of[kept]
    numbers = torch.arange(len(kept))
    if task.direction == "image_to_text":
        pairs = torch.stack([numbers, text_of], dim=1)
        found = places(image_features, text_features, pairs, ranks.device)
        scores = {"top1": recall(found, 1), "top5": recall(found, 5)}
        chance = 1 / len(text_features)
    else:
        pairs = torch.stack([text_of, numbers], dim=1)
        found = places(text_features, image_features, pairs, ranks.device)
        scores = {"recall_at_1": recall(found, 1), "recall_at_5": recall(found, 5)}
        chance = 1 / len(found)  # on average, as each image is of one text
    scores |= {"chance": chance, "n": len(found), "undecodable": len(undecodable)}
    examples = []
    for row in torch.linspace(0, len(kept) - 1, min(12, len(kept))).long().tolist():
        similarity = text_features @ image_features[row]
        values, nearest = similarity.topk(min(5, len(held_out.texts)))
        examples.append(
            {
                "image": base64.b64encode(
                    held_out.encoded_image(int(kept[row])).tobytes()
                ).decode(),
                "caption": held_out.texts[int(text_of[row])],
                "nearest": [
                    [held_out.texts[text], round(value, 4)]
                    for text, value in zip(nearest.tolist(), values.tolist())
                ],
            }
        )
    return scores, examples
