"""Launch parameters: a pure function of kernel, device generation, dtype and shape.

Nothing is timed at run time, so all ranks agree and a run repeats bit for bit. Registers, shared
memory and spills of each: python -m laclip.kernels.resources.
"""

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A kernel's tile and how it is run; slabs and per_processor are for gradient_tiles alone."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    slabs: int = 1
    per_processor: int = 1


# 128 x 256 keeps the traffic from L2 at 48 bytes a clock and processor; the smaller tiles are for
# what would spill: masks (the EDGE passes, 1-2 % of the tiles), the sigmoid, the fallback.
HOPPER = {
    "sweep": Tile(128, 256, 64, 8, 3),
    "sweep_edge": Tile(64, 256, 64, 8, 3),
    "online": Tile(128, 128, 64, 8, 3),
    "softmax": Tile(128, 256, 64, 8, 3),
    "softmax_edge": Tile(128, 128, 64, 8, 3, 2),
    "sigmoid": Tile(128, 128, 64, 8, 3, 2, 2),
    "sigmoid_edge": Tile(128, 64, 64, 8, 3, 2),
}
# Where one 128 x 256 tile a processor would leave processors idle.
HOPPER_SMALL = HOPPER | {
    "sweep": Tile(128, 128, 64, 8, 3),
    "sweep_edge": Tile(64, 128, 64, 4, 3),
    "softmax": Tile(128, 128, 64, 8, 3),
}
# Other generations: never tuned, chosen to fit 99 KiB of shared memory.
OTHER = {
    "sweep": Tile(128, 128, 64, 8, 2),
    "sweep_edge": Tile(64, 128, 64, 4, 2),
    "online": Tile(128, 128, 64, 8, 2),
    "softmax": Tile(128, 128, 64, 8, 2, 2),
    "softmax_edge": Tile(128, 128, 64, 8, 2, 2),
    "sigmoid": Tile(128, 128, 64, 8, 2, 2),
    "sigmoid_edge": Tile(128, 64, 64, 8, 2, 2),
}
# Full-precision dots have no tensor core to feed.
FLOAT32 = dict.fromkeys(HOPPER, Tile(64, 64, 32, 8, 2)) | dict.fromkeys(
    ("sigmoid", "sigmoid_edge"), Tile(64, 64, 32, 8, 2, 2)
)


@lru_cache
def device_facts(device: torch.device) -> tuple[bool, int]:
    """Whether it is a Hopper GPU, and its count of processors; the interpreter plays an H100."""
    if device.type != "cuda":
        return True, 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) == (9, 0), properties.multi_processor_count


def tile(kernel: str, features: torch.Tensor, rows: int, columns: int) -> Tile:
    """The tile of `kernel` for a [rows, columns] block of similarities of such features."""
    hopper, processors = device_facts(features.device)
    if features.dtype == torch.float32:
        return FLOAT32[kernel]
    if not hopper:
        return OTHER[kernel]
    small = -(-rows // 128) * -(-columns // 256) < processors
    return (HOPPER_SMALL if small else HOPPER)[kernel]


def sweep_splits(column_blocks: int, row_tiles: int, processors: int) -> int:
    """In how many parts to sweep each block of columns, so that the last wave is full too."""
    best, best_share = 1, 0.0
    for splits in range(1, max(1, min(16, row_tiles // 4)) + 1):
        programs = column_blocks * splits
        share = programs / (-(-programs // processors) * processors)
        if share > best_share + 0.02:
            best, best_share = splits, share
    return best
