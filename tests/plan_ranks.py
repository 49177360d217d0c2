"""One rank of the memory plan's test: real steps, and the most that their tensors took together.

python tests/plan_ranks.py FOLDER   (with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set)

Writes what it found to FOLDER/WORLD_SIZE.json: of each case planned and measured bytes of memory,
and of a checkpoint.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from laclip.captions import pack
from laclip.config import load_config
from laclip.engine import connect, start_engine
from laclip.engine_checkpoint import save_checkpoint
from laclip.engine_settings import engine_settings
from laclip.loader import LoadedBatch
from laclip.model import build_model
from laclip.parallel import find_ranks
from laclip.plan import Samples, checkpoint_bytes, count_kept, gpu_memory
from laclip.train_step import LossScale, train_step

VOCABULARY, EOT, TOKENS = 2000, 1999, 16
MODEL = [
    *("model.embed_dim=128", "model.vision.image_size=64", "model.vision.patch_size=8"),
    *("model.vision.width=256", "model.vision.depth=4", "model.vision.heads=4"),
    *("model.text.width=192", "model.text.depth=3", "model.text.heads=4"),
    *("train.steps=3", "train.loss_implementation=chunked", "model.text.context_length=32"),
]
ZERO = {"reduce_bucket_size": 600_000, "allgather_bucket_size": 600_000}
ZERO |= {"stage3_prefetch_bucket_size": 600_000}
CASES = {  # by ranks: name: ZeRO's settings, keys, captions an image
    1: {
        "micro-batches": ({"stage": 1, **ZERO}, ["train.micro_batch_size=8"], 1),
        "activations": ({"stage": 1, **ZERO}, ["model.activation_checkpointing=activations"], 1),
        "blocks": ({"stage": 1, **ZERO}, ["model.activation_checkpointing=blocks"], 1),
        "quick_gelu, qk_norm": (
            {"stage": 1, **ZERO},
            ["model.vision.activation=quick_gelu", "model.vision.qk_norm=true"],
            1,
        ),
        "locked text, dropout": (
            {"stage": 1, **ZERO},
            ["model.lock_text=true", "model.vision.patch_dropout=0.5"],
            1,
        ),
        "locked image, ZeRO-3": ({"stage": 3, **ZERO}, ["model.lock_image=true"], 1),
        "multi": ({"stage": 1, **ZERO}, [], 3),
    },
    2: {
        "stage 0": ({"stage": 0}, [], 1),
        "stage 1": ({"stage": 1, **ZERO, "overlap_comm": True}, [], 1),
        "stage 1, few pairs": ({"stage": 1, **ZERO, "overlap_comm": True}, [], 1),
        "stage 2": ({"stage": 2, **ZERO, "overlap_comm": True}, [], 1),
        "stage 2, micro-batches": ({"stage": 2, **ZERO}, ["train.micro_batch_size=8"], 1),
        "stage 3": ({"stage": 3, **ZERO, "overlap_comm": True}, [], 1),
        "stage 3, micro-batches": (
            {"stage": 3, **ZERO, "overlap_comm": True},
            ["train.micro_batch_size=8"],
            1,
        ),
    },
}


def held() -> int:
    """Bytes of all tensors that there are now, and were not at the start."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            if storage.device.type == "cpu" and storage.data_ptr():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak(step) -> int:
    """The most bytes that a step allocates at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    return np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()


def measure(folder: Path, name: str, ranks) -> tuple[float, ...]:
    zero, keys, variants = CASES[ranks.world_size][name]
    pairs = 2 if "few" in name else 24
    size = pairs * ranks.world_size
    config = load_config(None, [*MODEL, f"train.global_batch_size={size}", *keys])
    file = folder / f"zero_{ranks.rank}.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    settings = engine_settings(file, config, ranks)
    before = held()
    model = build_model(config.model, VOCABULARY, EOT)
    samples = Samples(1000, variants, TOKENS, None)
    kept = count_kept(config, samples, VOCABULARY, EOT)
    micro = settings["train_micro_batch_size_per_gpu"]
    planned = gpu_memory(config, settings, model, samples, kept, ranks.world_size, micro)
    checkpoint = checkpoint_bytes(settings, model)
    engine = start_engine(model, config, settings, ranks)
    side = config.model.vision.image_size
    shape = (pairs, TOKENS) if variants == 1 else (variants, pairs, TOKENS)
    token_ids = torch.randint(1, EOT, shape, dtype=torch.int32)
    token_ids[..., -1] = EOT
    batch = LoadedBatch(
        *(0, torch.randn(pairs, 3, side, side), pack(token_ids, EOT)),
        *(np.arange(pairs, dtype=np.uint64), np.zeros(pairs, np.uint8), 0),
    )

    def step() -> None:
        stage, scale = (
            zero["stage"],
            LossScale(config.train.precision, config.train.global_batch_size),
        )
        train_step(engine, batch, config, ranks, stage, scale, lambda: None)

    step()
    idle = held() - before - batch.images.nbytes
    # A collective that ends late, as on busy cores, keeps its buffers longer: the lesser of two.
    rise = min(peak(step) for _ in range(2))
    saved = save_checkpoint(engine, folder / name, {"step": 2}, zero["stage"], ranks)
    disk = sum(file.stat().st_size for file in saved.iterdir())
    engine.destroy()
    others = ("images", "DALI", "CUDA")  # the batch is not counted, and there is no GPU
    memory = sum(size for item, size in planned.items() if not item.startswith(others))
    return memory, float(idle + rise), checkpoint, disk


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = find_ranks()
    connect(load_config(None, MODEL), ranks)
    gc.collect()
    gc.freeze()  # what was imported is looked through no more
    found = {}
    for name in CASES[ranks.world_size]:
        found[name] = measure(folder, name, ranks)
        gc.collect()
    if ranks.is_first:
        (folder / f"{ranks.world_size}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
