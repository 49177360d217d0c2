"""Decoding every image of a shard with DALI, to find those that fail."""

import os
from pathlib import Path

import numpy as np
import torch

from laclip import _native
from laclip.images import DecodeError, ImagePipeline

BATCH = 64


def find_undecodable(tar: Path, records: np.ndarray) -> np.ndarray:
    """Positions in `records` (SAMPLE_RECORD) of the images that training would not use: DALI does
    not decode them, or the batch reader finds them cut short or broken.

    On the GPU where there is one. A read error is an error of the shard, not of an image.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = ImagePipeline(
        batch_size=BATCH,
        image_size=32,
        interpolation="linear",
        train=False,
        device=device,
        threads=os.cpu_count() or 1,
        depth=1,
    )
    failed: list[int] = []
    with open(tar, "rb") as file:
        for begin in range(0, len(records), BATCH):
            batch = []
            for record in records[begin : begin + BATCH]:
                file.seek(int(record["offset"]))
                data = file.read(int(record["bytes"]))
                if len(data) != record["bytes"]:
                    raise ValueError(f"{tar}: became shorter while it was read")
                batch.append(np.frombuffer(data, np.uint8))
            pipeline.feed(batch)
            try:
                pipeline.take()
            except DecodeError as error:
                failed += [begin + position for position in error.reasons]
            failed += [begin + i for i, data in enumerate(batch) if _native.find_damage(data)]
    return np.unique(np.array(failed, np.int64))
