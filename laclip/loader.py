"""The training loader: batch k is a pure function of (datasets, config, seed, k).

    shards -> laclip._native.BatchReader -> encoded images + crop windows + token ids
           -> laclip.images.ImagePipeline -> LoadedBatch on the device

Its whole state is the index of the next batch and the list of samples found bad.
"""

import dataclasses
import json
import os
import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from laclip import _native
from laclip.captions import PackedCaptions
from laclip.config import DataConfig
from laclip.dataset import Dataset, check_datasets
from laclip.images import DecodeError, ImagePipeline
from laclip.metrics import say
from laclip.tokenizer import Tokenizer

# csrc/image_header.hpp, BrokenReason
BROKEN = (
    "",
    "its header is not what the index says",
    "the file is cut short",
    "its data holds a marker that JPEG has not",
)


@dataclasses.dataclass(frozen=True)
class LoadedBatch:
    """One rank's part of global batch `index`."""

    index: int
    images: torch.Tensor  # [batch, 3, size, size] on the device, of the loader's dtype
    # Of shape [batch], or [variants, batch] for data.captions = "multi". Not pinned: the text tower
    # lays them out on the host, and pins the rows that it copies to the device.
    captions: PackedCaptions
    samples: np.ndarray  # uint64 [batch], places in the list of all samples
    drawn_variants: np.ndarray  # uint8 [batch], the caption that was drawn
    substitutes: int  # samples that stand in for bad ones
    asked: Any = 0.0  # when it was asked for and when it was there; see _now
    ready: Any = 0.0

    @property
    def wait_seconds(self) -> float:
        """The time that the device waited for it; a GPU not while it still computed."""
        if isinstance(self.ready, float):
            return self.ready - self.asked
        self.ready.synchronize()
        return self.asked.elapsed_time(self.ready) / 1000


def _now(device: torch.device) -> Any:
    """This moment: in seconds, or as an event when a GPU has done all that it was given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DataError(RuntimeError):
    """Data that training cannot go on with: unreadable, changed, or too much of it bad."""


class Loader:
    """Iterates over batches from `start` on, without end.

    datasets: opened dataset folders, tokenized by `tokenizer`. global_batch_size: over all ranks;
    a multiple of world_size. image_size: pixels a side. pad_captions: to the context length, for a
    text tower that pools at the last place. dtype: of the images. bad_samples: samples known to be
    bad, as an earlier run's `bad_samples` gave them. bad_log: a JSONL file to which this rank
    appends what it finds. Raises ValueError for settings that contradict the datasets.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        data: DataConfig,
        tokenizer: Tokenizer,
        *,
        seed: int,
        global_batch_size: int,
        image_size: int,
        context_length: int,
        pad_captions: bool = False,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        bad_samples: Iterable[int] = (),
        bad_log: Path | None = None,
    ):
        if global_batch_size % world_size:
            raise ValueError(
                f"train.global_batch_size: {global_batch_size} does not divide by the "
                f"{world_size} ranks; the nearest that does: "
                f"{max(1, global_batch_size // world_size) * world_size}"
            )
        check_datasets(datasets, data, tokenizer.fingerprint)
        options = reader_options(data, tokenizer, context_length)
        options.pad_captions = pad_captions
        options.seed = seed
        options.global_batch_size = global_batch_size
        options.rank, options.world_size = rank, world_size
        self.bad_samples: dict[int, str] = dict.fromkeys(bad_samples, "found by an earlier run")
        self._reader = _native.BatchReader(
            [files for dataset in datasets for files in shard_files(dataset)], options
        )
        self._reader.mark_bad(list(self.bad_samples))
        self._new_pipeline = partial(
            ImagePipeline,
            batch_size=global_batch_size // world_size,
            image_size=image_size,
            interpolation=data.interpolation,
            normalize=data.normalize,
            train=True,
            device=device,
            threads=data.decode_threads,
            depth=data.prefetch,
            hardware_decoder_share=data.hardware_decoder_share,
            dtype=dtype,
            exif_rotation=data.exif_rotation,
        )
        self._multi = data.captions == "multi"
        self._device = device
        self._depth = data.prefetch
        self._max_bad_fraction = data.max_bad_fraction
        self._bad_log = bad_log
        self._start = start
        self._found_bad = 0
        self._new_bad: dict[int, str] = {}
        self._prepared: LoadedBatch | DataError | None = None
        self._next = start
        self._process = os.getpid()
        self._begin()

    def _begin(self) -> None:
        """Nothing is under way; the batch after the last one that was given out comes next."""
        self._in_flight: deque[_native.Batch] = deque()
        self._pipeline = self._new_pipeline()
        self._reader.seek(self._next)
        self._under_way = True

    @property
    def num_samples(self) -> int:
        """Samples of an epoch."""
        return len(self._reader)

    def name(self, sample: int) -> tuple[str, str]:
        """The shard and the key of a sample, given by its place in the list of all samples."""
        return self._reader.name(sample)

    def mark_bad(self, samples: dict[int, str]) -> None:
        """Samples that another rank found bad: from now on they yield substitutes here too."""
        if samples:
            self.bad_samples |= samples
            self._reader.mark_bad(list(samples))

    def take_new_bad_samples(self) -> dict[int, str]:
        """What this rank found since the last call, for the other ranks' mark_bad."""
        new, self._new_bad = self._new_bad, {}
        return new

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> LoadedBatch:
        self.prepare()
        batch, self._prepared = self._prepared, None
        if isinstance(batch, DataError):
            raise batch
        assert batch is not None
        return batch

    def prepare(self) -> None:
        """Make ready what next() gives, or raises, while the caller has nothing else to do."""
        if self._prepared is None:
            try:
                self._prepared = self._load()
                self._next += 1
            except DataError as error:
                self._prepared = error
            except BaseException:  # Ctrl-C, say: what was under way is neither whole nor lost
                self._under_way = False
                raise

    def _load(self) -> LoadedBatch:
        if os.getpid() != self._process:  # fork() leaves the threads that read and decode behind
            raise RuntimeError(
                f"Loader: made in process {self._process}, used in process {os.getpid()}, which "
                "has none of its threads. Use it where it was made, with no DataLoader around it."
            )
        asked = _now(self._device)
        if not self._under_way:
            self._begin()
        while True:
            while len(self._in_flight) < self._depth:
                self._feed(self._read())
            try:
                images = self._pipeline.take()
                break
            except DecodeError as error:
                self._replace(error)
        batch = self._in_flight.popleft()
        shape = (batch.variants, batch.size) if self._multi else (batch.size,)
        return LoadedBatch(
            index=batch.index,
            images=images,
            captions=PackedCaptions(
                torch.from_numpy(batch.token_ids), torch.from_numpy(batch.cu_seqlens), shape
            ),
            samples=batch.samples,
            drawn_variants=batch.drawn_variants,
            substitutes=batch.substitutes,
            asked=asked,
            ready=_now(self._device),
        )

    def _read(self, index: int | None = None) -> _native.Batch:
        """The next batch, or one again."""
        try:
            return self._reader.next() if index is None else self._reader.read(index)
        except RuntimeError as error:
            raise DataError(f"data.train: {error}") from None

    def _feed(self, batch: _native.Batch) -> None:
        batch = self._sound(batch)
        self._pipeline.feed(batch.images(), batch.windows, batch.mirrors)
        self._in_flight.append(batch)

    def _sound(self, batch: _native.Batch) -> _native.Batch:
        """The batch, read again until the reader finds nothing broken in it."""
        while batch.broken.any():
            reasons = {int(i): BROKEN[batch.broken[i]] for i in np.flatnonzero(batch.broken)}
            self._count_bad(batch, reasons)
            batch = self._read(batch.index)
        return batch

    def _replace(self, error: DecodeError) -> None:
        """Substitutes for the images of the oldest batch that did not decode."""
        failed = self._in_flight.popleft()
        self._count_bad(failed, error.reasons)
        batch = self._sound(self._read(failed.index))
        encoded = batch.images()
        changed = np.flatnonzero(batch.samples != failed.samples).tolist()
        self._pipeline.replace({i: encoded[i] for i in changed}, batch.windows, batch.mirrors)
        self._in_flight.appendleft(batch)

    def _count_bad(self, batch: _native.Batch, reasons: dict[int, str]) -> None:
        """Name bad images, by their position in a batch, and stop the run if they are too many."""
        found = {int(batch.samples[i]): reason for i, reason in reasons.items()}
        found = {sample: found[sample] for sample in found if sample not in self.bad_samples}
        for sample, reason in found.items():
            path, key = self._reader.name(sample)
            self._log_bad({"shard": path, "key": key, "sample": sample, "reason": reason})
        self.mark_bad(found)
        self._new_bad |= found
        self._found_bad += len(found)
        read = (batch.index + 1 - self._start) * batch.size
        # What the fraction makes likely and what chance adds to it: the first of many ranks that
        # meets two bad images early must not end a run whose data is better than was asked for.
        likely = self._max_bad_fraction * read
        allowed = likely + 3 * likely**0.5 + (2 if likely else 0)
        if self._found_bad > allowed:
            listed = "\n".join(
                f"  {' '.join(self._reader.name(sample))}: {reason}"
                for sample, reason in list(self.bad_samples.items())[:20]
            )
            raise DataError(
                f"data.max_bad_fraction: {self._found_bad} of the first {read} samples could not "
                f"be decoded, more than chance makes of a share of {self._max_bad_fraction:g}. "
                f"Raise it to go on, or begin anew after 'laclip index --decode'. Found:\n{listed}"
            )

    def _log_bad(self, record: dict) -> None:
        line = json.dumps(record) + "\n"
        if self._bad_log is not None:
            try:
                with self._bad_log.open("a") as file:
                    file.write(line)
            except OSError as error:  # a full disk ends no run
                say(f"\nlaclip: '{self._bad_log}' could not be written: {error}; {line}", end="")


def reader_options(
    data: DataConfig, tokenizer: Tokenizer, context_length: int
) -> _native.ReaderOptions:
    """The C++ reader's options that a configuration and a tokenizer decide."""
    options = _native.ReaderOptions()
    options.window_shards = data.window_shards
    options.threads = data.reader_threads
    options.prefetch = data.prefetch
    options.captions = data.captions
    options.weights = list(data.weights)
    options.context_length = context_length
    options.sot_token = -1 if tokenizer.sot_token is None else tokenizer.sot_token
    options.eot_token, options.pad_token = tokenizer.eot_token, tokenizer.pad_token
    options.scale_low, options.scale_high = data.crop_scale
    options.ratio_low, options.ratio_high = data.crop_ratio
    options.flip = data.flip
    options.max_pixels = data.max_pixels
    options.exif_rotation = data.exif_rotation
    return options


def shard_files(dataset: Dataset) -> list[_native.ShardFiles]:
    """What the C++ reader needs to know of each shard."""
    files = []
    for shard in dataset.shards:
        stem = str(dataset.path / shard.stem)
        files.append(
            _native.ShardFiles(
                tar=stem + ".tar",
                samples=stem + ".samples",
                captions=stem + ".captions",
                tokenizer=dataset.tokenizer or "",
                count=shard.samples,
                variants=len(dataset.variants),
                samples_checksum=int(shard.samples_checksum, 16),
                captions_checksum=int(shard.captions_checksum or "0", 16),
            )
        )
    return files
