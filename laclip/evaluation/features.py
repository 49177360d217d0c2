"""Features of images and texts in batches; images that do not decode are named."""

import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from laclip.config import DataConfig
from laclip.images import DecodeError, ImagePipeline
from laclip.metrics import duration
from laclip.parallel import Ranks, gather_objects, gather_rows

Encode = Callable[[torch.Tensor], torch.Tensor]  # inputs -> features [batch, dim]
BATCHES_IN_FLIGHT = 2  # one is decoded while the one before is encoded


def evaluation_pipeline(
    data: DataConfig, image_size: int, batch_size: int, device: torch.device
) -> ImagePipeline:
    """Images as a run has them scored: the shorter side resized, the centre cut."""
    return ImagePipeline(
        batch_size=batch_size,
        image_size=image_size,
        interpolation=data.interpolation,
        normalize=data.normalize,
        train=False,
        device=device,
        threads=data.decode_threads,
        depth=BATCHES_IN_FLIGHT,
        exif_rotation=data.exif_rotation,
    )


class Progress:
    """Items done, rate, time left: one line on a terminal's stderr, elsewhere a line a minute."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, total, 0
        self.begin = self.shown = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def add(self, items: int) -> None:
        self.done += items
        now = time.monotonic()
        last = self.terminal and self.done == self.total
        if now - self.shown < (0.2 if self.terminal else 60) and not last:
            return
        self.shown = now
        rate = self.done / max(now - self.begin, 1e-9)
        left = duration((self.total - self.done) / rate)
        line = f"{self.label}: {self.done:,}/{self.total:,}, {rate:,.0f}/s, {left} left"
        sys.stderr.write(f"\r{line} \x1b[K" + "\n" * last if self.terminal else f"{line}\n")
        sys.stderr.flush()


@torch.no_grad()
def encode_images(
    read: Callable[[int], np.ndarray],
    count: int,
    encode: Encode,
    pipeline: ImagePipeline,
    batch_size: int,
    ranks: Ranks,
    progress: Progress | None = None,
) -> tuple[torch.Tensor, dict[int, str]]:
    """Features of images 0 to count - 1, by all ranks together.

    read(number): an image's encoded bytes, uint8; called from several threads. pipeline: with
    BATCHES_IN_FLIGHT. Returns fp32 features [count, dim] on the CPU, and the reasons of those that
    do not decode, by their numbers; their rows mean nothing.
    """
    undecodable: dict[int, str] = {}
    batches = _batches(count, batch_size, ranks)
    inputs = _decode(batches, read, pipeline, undecodable)
    features = _encode(inputs, encode, count, ranks, progress)
    if dist.is_initialized():
        for part in gather_objects(undecodable):
            undecodable |= part
    return features, dict(sorted(undecodable.items()))


@torch.no_grad()
def encode_texts(
    token_ids: np.ndarray,
    encode: Encode,
    batch_size: int,
    ranks: Ranks,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Features [texts, dim] of padded captions, int32 [texts, context_length]; fp32, on the CPU."""
    batches = _batches(len(token_ids), batch_size, ranks)
    inputs = (torch.from_numpy(token_ids[numbers]) for numbers in batches)
    return _encode(inputs, encode, len(token_ids), ranks, progress)


def _batches(count: int, batch_size: int, ranks: Ranks) -> list[list[int]]:
    """The numbers of this rank's items, batch by batch."""
    share = -(-count // ranks.world_size)
    # Equal shares, the last item repeated: under ZeRO-3 every rank must take part in every pass.
    numbers = [min(ranks.rank * share + i, count - 1) for i in range(share)]
    return [numbers[begin : begin + batch_size] for begin in range(0, share, batch_size)]


def _encode(
    inputs: Iterable[torch.Tensor],
    encode: Encode,
    count: int,
    ranks: Ranks,
    progress: Progress | None,
) -> torch.Tensor:
    features = []
    for batch in inputs:
        features.append(encode(batch).float())
        if progress is not None:
            progress.add(len(batch))
    rows = torch.cat(features)
    if dist.is_initialized() and ranks.world_size > 1:
        rows = gather_rows(rows)
    return rows[:count].cpu()


def _decode(
    batches: list[list[int]],
    read: Callable[[int], np.ndarray],
    pipeline: ImagePipeline,
    undecodable: dict[int, str],
) -> Iterator[torch.Tensor]:
    """Batches of pixels; an image that does not decode is noted, another stands in its row."""
    blank = _blank_image()
    with ThreadPoolExecutor(pipeline.threads) as readers:

        def feed(numbers: list[int]) -> None:
            encoded = list(readers.map(read, numbers))
            for place, number in enumerate(numbers):
                if not len(encoded[place]):
                    undecodable[number], encoded[place] = "zero bytes", blank
            pipeline.feed(encoded)

        for index in range(min(BATCHES_IN_FLIGHT - 1, len(batches))):
            feed(batches[index])
        for index, numbers in enumerate(batches):
            if index + BATCHES_IN_FLIGHT - 1 < len(batches):
                feed(batches[index + BATCHES_IN_FLIGHT - 1])
            try:
                images = pipeline.take()
            except DecodeError as error:
                undecodable |= {numbers[i]: reason for i, reason in error.reasons.items()}
                pipeline.replace(dict.fromkeys(error.reasons, blank))
                images = pipeline.take()
            yield images


def _blank_image() -> np.ndarray:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)
