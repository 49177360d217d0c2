"""Decoding and augmentation with DALI, on the GPU where there is one. The only module with DALI."""

import re

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
import torch
from nvidia.dali import math as dali_math
from nvidia.dali.pipeline import Pipeline

# Mean and standard deviation of the channels, in [0, 1]: of OpenAI's CLIP, and of ImageNet.
NORMALIZATION = {
    "openai": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_INTERPOLATION = {"cubic": types.DALIInterpType.INTERP_CUBIC, "linear": types.INTERP_LINEAR}


class DecodeError(RuntimeError):
    """Images that DALI could not decode. reasons: why, by the image's position in the batch."""

    def __init__(self, reasons: dict[int, str]):
        super().__init__("; ".join(f"image {i}: {reason}" for i, reason in reasons.items()))
        self.reasons = reasons


class ImagePipeline:
    """Encoded images in, `[batch, 3, size, size]` fp32 out, several batches in flight.

    feed() hands over a batch and returns at once; take() waits for the oldest one. Training crops
    the given windows (decoding no more of the image than needed); evaluation resizes the shorter
    side and cuts the centre. After a DecodeError everything in flight is lost: feed it again.

    image_size: pixels a side. interpolation: cubic or linear, antialiased. normalize: a key of
    NORMALIZATION. device: where images are decoded, and where take() leaves them. depth: batches
    in flight.
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
    ):
        self.batch_size = batch_size
        self.image_size = image_size
        self.interpolation = _INTERPOLATION[interpolation]
        self.normalize = normalize
        self.train = train
        self.device = device
        self.threads = threads
        self.depth = depth
        self.hardware_decoder_share = hardware_decoder_share
        self._in_flight: list[tuple] = []
        self._pipeline = self._build(batch_size)

    def _build(self, batch_size: int) -> Pipeline:
        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=self.device.index or 0 if gpu else None,
            prefetch_queue_depth=self.depth,
            exec_dynamic=True,
        )
        decoder = {
            "device": "mixed" if gpu else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": False,
        }
        if gpu:
            decoder["hw_decoder_load"] = self.hardware_decoder_share
        mean, std = NORMALIZATION[self.normalize]
        with pipeline:
            encoded = fn.external_source(name="encoded", device="cpu", dtype=types.UINT8, ndim=1)
            # An image whose header does not parse makes the decoder give up while its threads still
            # work on the batch, and the process crashes (DALI 2.4). So a parser that fails cleanly
            # comes first, and the decoder's window depends on its result.
            parsed = fn.peek_image_shape(encoded, adjust_orientation=False)
            zero = fn.cast(parsed[0] * 0, dtype=types.INT32)
            if self.train:
                anchor = fn.external_source(name="anchor", device="cpu", dtype=types.INT32, ndim=1)
                shape = fn.external_source(name="shape", device="cpu", dtype=types.INT32, ndim=1)
                mirror = fn.external_source(name="mirror", device="cpu", dtype=types.INT32, ndim=0)
                anchor = anchor + zero
                size = [self.image_size, self.image_size]
            else:
                # torchvision's Resize and CenterCrop: the longer side is cut to a whole number of
                # pixels, half pixels of the crop's place round to even.
                short = dali_math.min(parsed[0], parsed[1])
                height = self.image_size * parsed[0] // short
                width = self.image_size * parsed[1] // short
                anchor = fn.stack(zero, zero)
                shape = fn.cast(fn.stack(parsed[1], parsed[0]), dtype=types.INT32)
                size = fn.cast(fn.stack(height, width), dtype=types.FLOAT)
            images = fn.decoders.image_slice(encoded, anchor, shape, axis_names="WH", **decoder)
            images = fn.resize(images, size=size, interp_type=self.interpolation, antialias=True)
            if not self.train:
                start = [_half_to_even(length - self.image_size) for length in (width, height)]
                images = fn.slice(
                    images,
                    fn.cast(fn.stack(*start), dtype=types.INT32),
                    (self.image_size, self.image_size),
                    axis_names="WH",
                )
            images = fn.crop_mirror_normalize(
                images,
                mirror=mirror if self.train else 0,
                mean=[255 * channel for channel in mean],
                std=[255 * channel for channel in std],
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def feed(
        self,
        encoded: list[np.ndarray],
        windows: np.ndarray | None = None,
        mirrors: np.ndarray | None = None,
    ) -> None:
        """Start a batch: at most batch_size uint8 arrays.

        windows: int32 `[batch, 4]`, x, y, width, height in pixels, and mirrors: `[batch]`, 1 to
        flip; both for training alone. The images stay referenced until take() gives them.
        """
        self._run(self._pipeline, encoded, windows, mirrors)
        self._in_flight.append((encoded, windows, mirrors))

    def _run(self, pipeline: Pipeline, encoded, windows, mirrors) -> None:
        pipeline.feed_input("encoded", encoded)
        if self.train:
            pipeline.feed_input("anchor", np.ascontiguousarray(windows[:, :2]))
            pipeline.feed_input("shape", np.ascontiguousarray(windows[:, 2:]))
            pipeline.feed_input("mirror", mirrors.astype(np.int32))
        pipeline._run_once()

    def take(self) -> torch.Tensor:
        """The oldest batch in flight, `[batch, 3, size, size]` fp32. Raises DecodeError."""
        batch = self._in_flight.pop(0)
        try:
            (output,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            self._in_flight.clear()
            self._pipeline = self._build(self.batch_size)
            raise self._decode_error(batch, error) from None
        images = torch.empty(len(batch[0]), 3, self.image_size, self.image_size, device=self.device)
        if self.device.type == "cuda":
            images.copy_(torch.from_dlpack(output.as_tensor()))
        else:
            images.numpy()[...] = output.as_array()
        self._pipeline.release_outputs()
        return images

    def _decode_error(self, batch: tuple, error: RuntimeError) -> Exception:
        """Which images failed: DALI names them for some damage only, so each is tried alone."""
        encoded, windows, mirrors = batch
        failed = {}
        probe = self._build(1)
        for i, image in enumerate(encoded):
            own = (windows[i : i + 1], mirrors[i : i + 1]) if self.train else (None, None)
            try:
                self._run(probe, [image], *own)
                probe.share_outputs()
                probe.release_outputs()
            except RuntimeError as failure:
                failed[i] = _reason(str(failure))
                probe = self._build(1)
        # A failure that no single image repeats is not the data's: it is passed on.
        return DecodeError(failed) if failed else error


def _half_to_even(length):
    """Half of a whole number of pixels, rounded as Python's round does."""
    half = length // 2
    return half + (length - 2 * half) * (half - half // 2 * 2)


def _reason(message: str) -> str:
    """The telling line of a DALI error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"[Ff]ailed to|failure|nsupported", line)]
    return (telling or lines)[0]
