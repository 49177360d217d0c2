"""Decoding and augmentation with DALI, on the GPU where there is one. The only module with DALI.

On a CPU DALI decodes, and csrc/resize.cpp resizes, flips and normalizes.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import math as dali_math
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from laclip import _native

# Mean and standard deviation of the channels, in [0, 1]: of OpenAI's CLIP, of ImageNet, and what
# SigLIP and the ViTs of ImageNet-21k take.
NORMALIZATION = {
    "openai": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_INTERPOLATION = {"cubic": types.DALIInterpType.INTERP_CUBIC, "linear": types.INTERP_LINEAR}


class DecodeError(RuntimeError):
    """Images that DALI could not decode. reasons: why, by the image's position in the batch."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(f"image {i}: {reason}" for i, reason in reasons.items()))
        self.reasons = reasons


# Images that DALI decodes at once. A batch goes through it in such parts, so that a failure costs a
# part, and a part's pixels are normalized while the next is decoded.
_PART_CPU, _PART_CPU_PER_THREAD, _PART_GPU = 64, 8, 128


@dataclasses.dataclass
class _Batch:
    """A batch in flight: images [0, started) were given to DALI, [0, done) came back."""

    encoded: list[TensorCPU]
    drawn: np.ndarray | None  # int32 [batch, 5], window and mirror
    images: torch.Tensor | None = None
    started: int = 0
    done: int = 0
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)


class ImagePipeline:
    """Encoded images in, `[batch, 3, size, size]` out, several batches in flight.

    feed() hands over a batch and returns at once; take() waits for the oldest one. Training crops
    the given windows (decoding no more of the image than needed); evaluation resizes the shorter
    side and cuts the centre. take() raises DecodeError with every image of the batch that failed;
    replace() then gives others for them; where feed() is called instead, the batch is left out.

    image_size: pixels a side. interpolation: cubic or linear, antialiased. normalize: a key of
    NORMALIZATION. device: where images are decoded, and where take() leaves them. depth: batches
    in flight. dtype: of the result; half precision is rounded from fp32. exif_rotation: turn images
    as their EXIF data says; windows then lie in the turned image.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: int,
        interpolation: str = "cubic",
        normalize: str = "openai",
        train: bool,
        device: torch.device,
        threads: int = 2,
        depth: int = 2,
        hardware_decoder_share: float = 0.75,
        dtype: torch.dtype = torch.float32,
        exif_rotation: bool = False,
    ):
        self.image_size = image_size
        self.interpolation = interpolation
        mean, std = NORMALIZATION[normalize]
        self._mean = [255 * channel for channel in mean]
        self._std = [255 * channel for channel in std]
        self._scale = 1 / torch.tensor(self._std, device=device)[:, None, None]
        self._shift = -torch.tensor(self._mean, device=device)[:, None, None] * self._scale
        self.train = train
        self.device = device
        self.threads = threads
        self.hardware_decoder_share = hardware_decoder_share
        self.dtype = dtype
        self.exif_rotation = exif_rotation
        gpu = device.type == "cuda"
        part = _PART_GPU if gpu else max(_PART_CPU, _PART_CPU_PER_THREAD * threads)
        self.part = min(batch_size, part)
        self.queue = depth * -(-batch_size // self.part)
        self._in_flight: deque[_Batch] = deque()
        self._read: deque[tuple] = deque()  # on a GPU: outputs, each with the event of its reading
        self._pipeline = self._build()
        self._apart: Pipeline | None = None  # for images that are decoded out of turn

    def _build(self) -> Pipeline:
        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.part,
            num_threads=self.threads,
            device_id=self.device.index or 0 if gpu else None,
            prefetch_queue_depth=self.queue,
            exec_dynamic=True,
        )
        decoder = {
            "device": "mixed" if gpu else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": self.exif_rotation,
        }
        if gpu:
            decoder["hw_decoder_load"] = self.hardware_decoder_share

        def source(name, dtype, ndim, **more):
            return fn.external_source(name=name, device="cpu", dtype=dtype, ndim=ndim, **more)

        with pipeline:
            # DALI reads the caller's memory: it stays referenced until the batch is taken. What the
            # mixed decoder reads must be pinned: DALI's threads copy it there. Pinning the reader's
            # buffers instead would save these 40 kB an image and lock four batches in memory.
            encoded = source("encoded", types.UINT8, 1, no_copy=True)
            # An image whose header does not parse makes the decoder give up while its threads still
            # work on the batch, and the process crashes (DALI 2.4). So a parser that fails cleanly
            # comes first, and the decoder's window depends on its result.
            parsed = fn.peek_image_shape(encoded, adjust_orientation=self.exif_rotation)
            zero = fn.cast(parsed[0] * 0, dtype=types.INT32)
            if self.train:
                drawn = source("drawn", types.INT32, 1)
                anchor, shape, mirror = drawn[0:2] + zero, drawn[2:4], drawn[4]
            else:
                anchor = fn.stack(zero, zero)
                shape = fn.cast(fn.stack(parsed[1], parsed[0]), dtype=types.INT32)
            images = fn.decoders.image_slice(encoded, anchor, shape, axis_names="WH", **decoder)
            if _dali_resizes(self.device):  # what waits to be taken is uint8, a quarter of fp32
                resize = {
                    "size": [self.image_size, self.image_size],
                    "interp_type": _INTERPOLATION[self.interpolation],
                    "antialias": True,
                }
                if self.train:
                    images = fn.flip(fn.resize(images, **resize), horizontal=mirror)
                else:
                    begin, end = _centre(parsed, self.image_size)
                    images = fn.resize(images, roi_start=begin, roi_end=end, **resize)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def feed(
        self,
        encoded: list[Any],
        windows: np.ndarray | None = None,
        mirrors: np.ndarray | None = None,
    ) -> None:
        """Start a batch: at most batch_size uint8 arrays or DLPack capsules.

        windows: int32 `[batch, 4]`, x, y, width, height in pixels, and mirrors: `[batch]`, 1 to
        flip; both for training alone. The images stay referenced until take() gives them.
        """
        if self._in_flight and self._in_flight[0].reasons:
            self._in_flight.popleft()
        self._in_flight.append(_Batch(list(map(TensorCPU, encoded)), _drawn(windows, mirrors)))
        self._start_all()

    def _start_all(self) -> None:
        for batch in self._in_flight:
            while batch.started < len(batch.encoded):
                end = min(batch.started + self.part, len(batch.encoded))
                self._run(self._pipeline, batch, range(batch.started, end))
                batch.started = end

    def _run(self, pipeline: Pipeline, batch: _Batch, positions: Sequence[int]) -> None:
        # As DALI's own lists: handing over arrays takes it several times as long.
        encoded = [batch.encoded[i] for i in positions]
        views = TensorListCPU(encoded, contiguous=False)  # type: ignore[call-overload]
        pipeline.feed_input("encoded", views)
        if batch.drawn is not None:
            pipeline.feed_input("drawn", TensorListCPU(batch.drawn[list(positions)]))
        pipeline._run_once()

    def take(self) -> torch.Tensor:
        """The oldest batch in flight, `[batch, 3, size, size]` of dtype. Raises DecodeError."""
        batch = self._in_flight[0]
        if batch.images is None:
            shape = len(batch.encoded), 3, self.image_size, self.image_size
            batch.images = torch.empty(shape, dtype=self.dtype, device=self.device)
        while batch.done < len(batch.encoded):
            positions = range(batch.done, min(batch.done + self.part, len(batch.encoded)))
            begin, batch.done = batch.done, positions.stop
            try:
                images = batch.images[begin : batch.done]
                self._fetch(self._pipeline, images, batch, positions)
            except RuntimeError as error:
                self._recover(batch, positions, error)
        if batch.reasons:
            raise DecodeError(batch.reasons)
        return self._in_flight.popleft().images  # type: ignore[return-value]

    def replace(
        self,
        encoded: dict[int, Any],
        windows: np.ndarray | None = None,
        mirrors: np.ndarray | None = None,
    ) -> None:
        """Other images, by position, for the batch whose take() failed; then take() it again.

        windows and mirrors: of the whole batch, as for feed().
        """
        batch = self._in_flight[0]
        batch.reasons, batch.drawn = {}, _drawn(windows, mirrors)
        for position, image in encoded.items():
            batch.encoded[position] = TensorCPU(image)
        self._decode_apart(batch, sorted(encoded))

    def _fetch(
        self, pipeline: Pipeline, images: torch.Tensor, batch: _Batch, positions: Sequence[int]
    ) -> None:
        """Normalizes what DALI finished first; on a GPU in its stream, without waiting."""
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (output,) = pipeline.outputs(cuda_stream=stream)
        if _dali_resizes(self.device):
            channels_last = torch.from_dlpack(output.as_tensor())
            channels_first = channels_last.permute(0, 3, 1, 2)
            torch.addcmul(self._shift, channels_first, self._scale, out=images)
            if stream is not None:
                # DALI's streams know nothing of this reader: an output that was let go before it
                # has run would be decoded into.
                self._read.append((stream.record_event(), output))
                while self._read and self._read[0][0].query():
                    self._read.popleft()
            return
        decoded = [output.at(i) for i in range(len(positions))]
        mirrors = [0] * len(decoded)
        if batch.drawn is not None:
            mirrors = batch.drawn[positions, 4].tolist()
        resized = images if images.dtype == torch.float32 else torch.empty(images.shape)
        _native.resize_images(
            decoded,
            mirrors,
            resized.numpy(),
            self.interpolation,
            not self.train,
            self._mean,
            self._std,
            self.threads,
        )
        if resized is not images:
            images.copy_(resized)

    def _recover(self, batch: _Batch, positions: Sequence[int], error: RuntimeError) -> None:
        """Decode apart the lost part of the oldest batch; all that follows, in a new pipeline."""
        failed = _named(error, positions)
        self._pipeline = self._build()  # the old one ends before its images are let go
        for lost in self._in_flight:
            lost.started = lost.done
        self._start_all()
        batch.reasons |= failed
        self._decode_apart(batch, [i for i in positions if i not in failed])

    def _decode_apart(self, batch: _Batch, positions: list[int]) -> None:
        """Decode some images of a batch, whichever fail."""
        assert batch.images is not None
        while positions:
            part = positions[: self.part]
            try:
                batch.images[part] = self._run_apart(batch, part)
                positions = positions[len(part) :]
            except RuntimeError as error:
                failed = _named(error, part) or self._try_each(batch, part)
                if not failed:  # no single image repeats it: not the data's
                    raise
                batch.reasons |= failed
                positions = [i for i in positions if i not in failed]

    def _run_apart(self, batch: _Batch, positions: list[int]) -> torch.Tensor:
        pipeline, self._apart = self._apart or self._build(), None
        self._run(pipeline, batch, positions)
        shape = len(positions), 3, self.image_size, self.image_size
        images = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._fetch(pipeline, images, batch, positions)
        self._apart = pipeline  # after an error it is not to be used again
        return images

    def _try_each(self, batch: _Batch, positions: list[int]) -> dict[int, str]:
        failed = {}
        for position in positions:
            try:
                self._run_apart(batch, [position])
            except RuntimeError as error:
                failed[position] = _named(error, [position]).get(position, _reason(str(error)))
        return failed


def _drawn(windows: np.ndarray | None, mirrors: np.ndarray | None) -> np.ndarray | None:
    """Windows and mirrors as one int32 array [batch, 5]."""
    if windows is None or mirrors is None:
        return None
    return np.column_stack([windows, mirrors]).astype(np.int32)


def _named(error: RuntimeError, positions: Sequence[int]) -> dict[int, str]:
    """The images that an error of DALI names, and why; it does so for some damage only.

    Raises an error of the GPU, such as a lack of its memory, as no image is to blame for it.
    """
    if re.search(r"CUDA (allocation failed|\w+ API error|out of memory|error)", str(error)):
        raise error
    numbers = {int(number) for number in re.findall(r"decode sample #(\d+)", str(error))}
    reason = re.sub(r" *#\d+ *:?", "", _reason(str(error)))
    return {positions[number]: reason for number in numbers if number < len(positions)}


def _dali_resizes(device: torch.device) -> bool:
    """On a CPU DALI decodes alone: its resize there takes three times as long as ours."""
    return device.type == "cuda"


def _centre(parsed, side):
    """What torchvision's Resize and CenterCrop leave of an image of this shape: from where to where
    in each direction, in its own pixels."""
    begin, end = [], []
    for length in (parsed[0], parsed[1]):
        resized = side * length // dali_math.min(parsed[0], parsed[1])
        half = (resized - side) // 2
        half += (resized - side - 2 * half) * (half % 2)  # half pixels round to even
        begin.append(half * length / resized)
        end.append((half + side) * length / resized)
    return fn.stack(*begin), fn.stack(*end)


def _reason(message: str) -> str:
    """The telling line of a DALI error."""
    if "fn.peek_image_shape" in message:  # the parser's own line is a number
        return "its header is of no image that DALI decodes"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"[Ff]ailed to|failure|nsupported", line)]
    return (telling or lines)[0]
