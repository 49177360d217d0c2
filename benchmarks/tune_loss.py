"""Candidate tiles of the loss kernels, timed whole: what launch_table.py's table is chosen from.

python benchmarks/tune_loss.py [--dims 768] [--sizes 8192,32768]    on a GPU

Each line changes one kernel's tile and leaves the others; "table" is what is in use. Candidates
that do not compile, spill or fit are left out beforehand: python -m laclip.kernels.resources.
"""

import argparse
import sys
from pathlib import Path

import torch
from harness import ROOT, Case, append, compare, table
from loss import make_inputs

from laclip.kernels import clip_loss, launch_table, siglip_loss
from laclip.kernels.launch_table import Tile

# The EDGE pass of a sweep must own as many columns as the plain pass.
EDGE_256, EDGE_128 = Tile(64, 256, 64, 8, 3), Tile(64, 128, 64, 4, 3)
CANDIDATES = {
    "clip": {
        "table": {},
        "sweep 128x256 4 stages": {"sweep": Tile(128, 256, 64, 8, 4), "sweep_edge": EDGE_256},
        "sweep 256x128": {"sweep": Tile(256, 128, 64, 8, 3), "sweep_edge": EDGE_128},
        "sweep 256x128 4 stages": {"sweep": Tile(256, 128, 64, 8, 4), "sweep_edge": EDGE_128},
        "sweep 128x128": {"sweep": Tile(128, 128, 64, 8, 3), "sweep_edge": EDGE_128},
        "softmax 4 stages 2 slabs": {"softmax": Tile(128, 256, 64, 8, 4, 2)},
        "softmax 256x128": {"softmax": Tile(256, 128, 64, 8, 3)},
        "softmax 128x128 2 a processor": {"softmax": Tile(128, 128, 64, 8, 2, 2, 2)},
    },
    "siglip": {
        "table": {},
        "sigmoid 1 a processor": {"sigmoid": Tile(128, 128, 64, 8, 4, 2, 1)},
        "sigmoid 2 stages": {"sigmoid": Tile(128, 128, 64, 8, 2, 2, 2)},
    },
}


CHOSEN, CHOSEN_SMALL = dict(launch_table.HOPPER), dict(launch_table.HOPPER_SMALL)


def case(loss: str, name: str, tiles: dict[str, Tile], size: int, dim: int, leaves: list) -> Case:
    """Forward and backward of a whole loss with these tiles in place of the table's."""
    function = clip_loss if loss == "clip" else siglip_loss

    def use(turn: int) -> None:
        launch_table.HOPPER.update(CHOSEN | tiles)
        launch_table.HOPPER_SMALL.update(CHOSEN_SMALL | tiles)

    def both(_: None) -> None:
        torch.autograd.grad(function(*leaves, implementation="triton"), leaves)

    work = (8.0 if loss == "clip" else 6.0) * size**2 * dim
    return Case(name, both, use, work, "TFLOP/s", 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="8192,32768")
    parser.add_argument("--dims", default="768")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/loss_tiles.jsonl")
    options = parser.parse_args()
    failed: list[str] = []
    for loss, candidates in CANDIDATES.items():
        for dim in map(int, options.dims.split(",")):
            for size in map(int, options.sizes.split(",")):
                leaves = make_inputs(loss, "random", size, dim, torch.bfloat16, "cuda")
                records = compare(
                    f"{loss} tiles",
                    [case(loss, n, tiles, size, dim, leaves) for n, tiles in candidates.items()],
                    shape={"batch": size, "dim": dim},
                    dtype="bf16",
                    device="cuda",
                    seconds=options.seconds,
                )
                append(records, options.out)
                print(table(records), flush=True)
                failed += [f"{loss}, {size} x {dim}: {r.name}" for r in records if r.failed]
    if failed:
        sys.exit(f"tune_loss: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
