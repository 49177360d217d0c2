"""A trained model and its run's way with images and texts."""

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from laclip.checkpoint import find_weights, read_weights
from laclip.config import load_config
from laclip.evaluation.data import ImageSet
from laclip.evaluation.features import (
    Progress,
    encode_images,
    encode_texts,
    evaluation_pipeline,
)
from laclip.images import ImagePipeline
from laclip.model import build_model
from laclip.model_weights import load_state
from laclip.parallel import Ranks
from laclip.tokenizer import load_tokenizer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainedModel:
    """The model in a run's folder (config.toml and model.pt), on the GPU where there is one.

    Images are resized, cut and normalized as the run's configuration says, features computed in its
    precision. overrides: `section.key=value`, as for the run itself.
    """

    def __init__(self, folder: Path, overrides: Iterable[str] = (), checkpoint: str | None = None):
        if not (folder / "config.toml").is_file():
            raise FileNotFoundError(
                f"'{folder}' holds no config.toml, expected the folder of a run"
            )
        self.source = find_weights(folder, checkpoint)
        self.config = load_config(folder / "config.toml", overrides)
        self.tokenizer = load_tokenizer(self.config.data.tokenizer)
        gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        self.ranks = Ranks(0, 1, 0, torch.device("cuda", 0) if gpu else torch.device("cpu"))
        attention = self.config.model.attention
        if not gpu and attention != "sdpa":
            raise ValueError(
                f"model.attention: {attention} computes on a GPU alone, and there is none. Add "
                "--set model.attention=sdpa"
            )
        model = build_model(
            self.config.model,
            self.tokenizer.vocab_size,
            self.tokenizer.eot_token,
            self.config.train.loss == "siglip",
        )
        load_state(model, read_weights(self.source), str(self.source))
        self.model = model.eval().to(self.device)

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @cached_property
    def _pipeline(self) -> ImagePipeline:
        size, batch = self.config.model.vision.image_size, self.config.evaluation.batch_size
        return evaluation_pipeline(self.config.data, size, batch, self.device)

    def _autocast(self) -> torch.autocast:
        precision = self.config.train.precision
        return torch.autocast(self.device.type, PRECISIONS[precision], enabled=precision != "fp32")

    def encode_images(
        self, images: ImageSet, label: str, projected: bool = True
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Features of a set's images, fp32 on the CPU, and why which do not decode.

        projected: unit-length features [images, embed_dim]; else those before the projection,
        [images, width]. Raises ValueError where no image decodes or features are not finite.
        """
        encode = self.model.encode_image if projected else self.model.image.pool
        with self._autocast():
            features, undecodable = encode_images(
                images.read,
                len(images.places),
                encode,
                self._pipeline,
                self.config.evaluation.batch_size,
                self.ranks,
                Progress(label, len(images.places)),
            )
        if len(undecodable) == len(images.places):
            raise ValueError(
                f"'{images.path}': none of its {len(images.places)} images decodes; "
                f"{images.names[0]}: {undecodable[0]}"
            )
        return self._checked(features), undecodable

    def encode_texts(self, texts: Sequence[str], label: str) -> torch.Tensor:
        """Unit-length features [texts, embed_dim], fp32 on the CPU."""
        length = self.config.model.text.context_length
        token_ids = self.tokenizer.encode_batch(texts, length)
        return self.encode_token_ids(token_ids, label)

    def encode_token_ids(self, token_ids: np.ndarray, label: str) -> torch.Tensor:
        with self._autocast():
            features = encode_texts(
                token_ids,
                self.model.encode_text,
                self.config.evaluation.batch_size,
                self.ranks,
                Progress(label, len(token_ids)),
            )
        return self._checked(features)

    def _checked(self, features: torch.Tensor) -> torch.Tensor:
        if not features.isfinite().all():
            raise ValueError(
                f"'{self.source}' gives features that are not finite: its weights are "
                "broken, or too large for train.precision = "
                f'"{self.config.train.precision}" (try --set train.precision=fp32)'
            )
        return features
