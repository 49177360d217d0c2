"""How near a rewrite is to its caption in meaning: the cosine of a sentence encoder's features."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laclip.rewrite.engine import Answer, Request
from laclip.rewrite.filters import tidy
from laclip.rewrite.model_folder import load_model

BATCH = 64  # answers that are measured together
HELD_SECONDS = 1.0  # that an answer waits for others; a kill costs what is held
MAX_TOKENS = 256  # of a text, as sentence encoders are made for


class Measured:
    """An engine whose answers carry their similarity to the caption."""

    def __init__(self, engine: Any, encoder: "Encoder"):
        self.engine, self.encoder = engine, encoder

    def answers(self, requests: Iterator[Request]) -> Iterator[tuple[Request, Answer]]:
        held: list[tuple[Request, Answer]] = []
        begin = time.monotonic()
        for pair in self.engine.answers(requests):
            if not held:
                begin = time.monotonic()
            held.append(pair)
            if len(held) == BATCH or time.monotonic() - begin > HELD_SECONDS:
                yield from self._measure(held)
                held = []
        yield from self._measure(held)

    def _measure(self, pairs: list[tuple[Request, Answer]]) -> Iterator[tuple[Request, Answer]]:
        texts = [(request.caption, tidy(answer.text)) for request, answer in pairs]
        for (request, answer), similarity in zip(pairs, self.encoder.compare(texts), strict=True):
            there = answer.text and not answer.refused and not answer.failed
            yield request, replace(answer, similarity=similarity) if there else answer


class Encoder:
    """A sentence encoder from a folder, on the GPU where there is one.

    Any model of transformers serves whose features are one vector a token. Folders of the package
    sentence-transformers say how these become the text's: their mean (also where nothing is said),
    the first token's or the last one's.
    """

    def __init__(self, folder: str | Path):
        self._pooling = _pooling(Path(folder))
        self.tokenizer, self.model = load_model(folder, "AutoModel", "--encoder")
        self.tokenizer.padding_side = "right"
        config = self.model.config
        places = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
        first = (getattr(config, "pad_token_id", None) or 0) + 1  # RoBERTa counts from there
        taken = first if "roberta" in config.model_type else 0
        self._longest = min(MAX_TOKENS, self.tokenizer.model_max_length, places - taken)

    def compare(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The cosine of the two texts of each pair, -1 to 1, to four digits."""
        if not pairs:
            return []
        features = self.embed([text for pair in pairs for text in pair])
        cosines = (features[0::2] * features[1::2]).sum(1).tolist()
        return [round(cosine, 4) for cosine in cosines]

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """Features [texts, width] of length 1, fp32, on the CPU; texts of one length together."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = []
        for begin in range(0, len(order), BATCH):
            batch = self.tokenizer(
                [texts[i] or " " for i in order[begin : begin + BATCH]],
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(self.model.device)
            found.append(self._pooled(self.model(**batch).last_hidden_state, batch.attention_mask))
        features = torch.nn.functional.normalize(torch.cat(found), dim=1).cpu()
        return features[torch.tensor(order).argsort()]

    def _pooled(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self._pooling == "cls":
            return tokens[:, 0]
        if self._pooling == "lasttoken":
            return tokens[torch.arange(len(tokens)), mask.sum(1) - 1]
        weights = mask[..., None].to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)


def _pooling(folder: Path) -> str:
    """mean, cls or lasttoken, as a folder of sentence-transformers says."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return "mean"
    modules = {entry["type"].rsplit(".", 1)[-1]: entry for entry in json.loads(listed.read_bytes())}
    more = modules.keys() - {"Transformer", "Pooling", "Normalize"}
    if more or "Pooling" not in modules:
        raise ValueError(
            f"--encoder {folder}: its modules are {', '.join(modules)}; expected Transformer, "
            "Pooling and perhaps Normalize. Take another encoder"
        )
    config = json.loads((folder / modules["Pooling"]["path"] / "config.json").read_bytes())
    if "pooling_mode" in config:
        chosen = [config["pooling_mode"]]
    else:  # a switch for each way
        ways = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        chosen = [
            ways.get(name, name.removeprefix("pooling_mode_"))
            for name, on in config.items()
            if name.startswith("pooling_mode_") and on
        ]
    if len(chosen) != 1 or chosen[0] not in ("mean", "cls", "lasttoken"):
        raise ValueError(
            f"--encoder {folder}: it pools by {', '.join(map(str, chosen))}; expected the mean, "
            "the first or the last token (cls, lasttoken). Take another encoder"
        )
    return chosen[0]
