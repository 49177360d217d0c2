"""Retrieval: texts found by images, and images by texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laclip.dataset import open_dataset
from laclip.evaluation.data import open_captioned
from laclip.evaluation.held_out import HeldOutSet
from laclip.evaluation.ranking import places, recall
from laclip.evaluation.trained import TrainedModel
from laclip.evaluation.zero_shot import counts

RECALLS = (1, 5, 10)


def retrieval(model: TrainedModel, path: Path) -> dict[str, Any]:
    """Recalls both ways on a dataset's original captions, or on tars; see docs/evaluation.md."""
    if (path / "dataset.json").is_file():
        length = model.config.model.text.context_length
        held_out = HeldOutSet(open_dataset(path), model.tokenizer, length)
        images, token_ids = held_out.images, held_out.token_ids
        pairs = torch.stack([torch.arange(len(images.places)), held_out.text_of], dim=1)
    else:
        images = open_captioned(path)
        token_ids, pairs = _distinct_texts(model, images.captions)
    image_features, undecodable = model.encode_images(images, "images")
    text_features = model.encode_token_ids(token_ids, "texts")
    decoded = torch.ones(len(images.places), dtype=torch.bool)
    decoded[list(undecodable)] = False
    pairs = pairs[decoded[pairs[:, 0]]]
    # Both sides without what was left out, numbered anew.
    kept_images, image_of = pairs[:, 0].unique(return_inverse=True)
    kept_texts, text_of = pairs[:, 1].unique(return_inverse=True)
    sides = image_features[kept_images], text_features[kept_texts]
    forth, back = torch.stack([image_of, text_of], 1), torch.stack([text_of, image_of], 1)
    return {
        "data": str(path),
        "texts": len(kept_texts),
        "image_to_text": _recalls(*sides, forth, model.device),
        "text_to_image": _recalls(*sides[::-1], back, model.device),
        **counts(images, undecodable),
    }


def _recalls(
    queries: torch.Tensor, candidates: torch.Tensor, pairs: torch.Tensor, device: torch.device
) -> dict[str, float]:
    found = places(queries, candidates, pairs, device)
    scores = {f"recall_at_{at}": recall(found, at) for at in RECALLS}
    return {**scores, "chance": len(pairs) / len(queries) / len(candidates)}


def _distinct_texts(
    model: TrainedModel, captions: Sequence[Sequence[str]]
) -> tuple[np.ndarray, torch.Tensor]:
    """Token ids [texts, context_length] of texts that differ to the model, and the pairs."""
    texts = [text for own in captions for text in own]
    token_ids = model.tokenizer.encode_batch(texts, model.config.model.text.context_length)
    distinct, text_of = np.unique(token_ids, axis=0, return_inverse=True)
    images = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    pairs = np.unique(np.stack([images, text_of.reshape(-1)], axis=1), axis=0)
    return distinct, torch.from_numpy(pairs)
