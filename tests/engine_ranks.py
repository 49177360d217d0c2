"""One rank of the engine's tests: many engines in a row, one start-up.

python tests/engine_ranks.py FOLDER   (with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set)

Writes what it found to FOLDER/found_{WORLD_SIZE}_{RANK}.pt; tests/test_engine.py judges it.
"""

import datetime
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import laclip.engine
from laclip.captions import pack
from laclip.checkpoint import newest_checkpoint
from laclip.config import load_config
from laclip.engine_checkpoint import fit_checkpoint, load_checkpoint, save_checkpoint
from laclip.engine_settings import engine_settings
from laclip.loader import LoadedBatch
from laclip.model import build_model
from laclip.parallel import JointError, find_ranks
from laclip.train_step import LossScale, train_step

ROOT = Path(__file__).parent.parent
VOCABULARY, EOT, CONTEXT, SIZE = 64, 63, 8, 16
# Some gradients are zero but for rounding; AdamW's usual eps would make steps of that.
LEARNING_RATE, EPS = 1e-3, 1e-4
TINY = [
    *("model.embed_dim=16", "model.vision.width=16", "model.vision.depth=1"),
    *("model.vision.heads=2", f"model.vision.image_size={SIZE}", "model.vision.patch_size=4"),
    *("model.vision.patch_dropout=0.5", "model.text.width=16", "model.text.depth=1"),
    *("model.text.heads=2", f"model.text.context_length={CONTEXT}", "optimizer.layer_decay=0.8"),
    *(f"optimizer.lr={LEARNING_RATE}", f"optimizer.eps={EPS}", "train.loss_implementation=chunked"),
]
STAGES = (0, 1, 2, 3)
BATCH, LARGE_BATCH = 16, 64
FP16_STEPS, MATRIX_STEPS, SHAPE_STEPS, GUARD_STEPS, ELASTIC_STEPS = 10, 20, 3, 5, 3
TOO_HIGH = 65536.0, 0  # a loss scale under which the first gradients overflow
BAD_LOSS, BAD_GRADIENT = 1, 3  # steps of the guards' runs
BEYOND_THE_CLAMP = "model.init_logit_scale=4.608"  # ln 100 is 4.6052: it falls below in few steps
MORE = {"round_robin_gradients": True, "stage3_module_granularity_threshold": 100}
ELASTIC = {  # what goes on under other numbers of ranks: the ZeRO stages, and the settings
    "": (STAGES, []),
    "locked": (STAGES, ["model.lock_image=true"]),
    # The scale of the logits alone is trained: most ranks hold nothing.
    "both_locked": ((2,), ["model.lock_image=true", "model.lock_text=true"]),
    "skipped": ((3,), ["train.precision=fp16"]),  # no update before the ranks change
}


def configure(*overrides, batch=BATCH):
    return load_config(None, [*TINY, f"train.global_batch_size={batch}", *overrides])


def new_model(config):
    torch.manual_seed(config.run.seed)
    return build_model(config.model, VOCABULARY, EOT, config.train.loss == "siglip")


def global_batch(index: int, size: int) -> LoadedBatch:
    """Images and captions that depend on the index alone."""
    generator = torch.Generator().manual_seed(index)
    images = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    token_ids = torch.randint(1, EOT, (size, CONTEXT), generator=generator, dtype=torch.int32)
    ends = torch.randint(1, CONTEXT, (size,), generator=generator)
    for row, end in zip(token_ids, ends):
        row[end], row[end + 1 :] = EOT, 0
    samples = np.arange(size, dtype=np.uint64) + np.uint64(1000 * index)
    return LoadedBatch(index, images, pack(token_ids, EOT), samples, np.zeros(size, np.uint8), 0)


def own_part(batch: LoadedBatch, ranks) -> LoadedBatch:
    share = len(batch.images) // ranks.world_size
    own = slice(ranks.rank * share, (ranks.rank + 1) * share)
    return LoadedBatch(
        batch.index,
        batch.images[own],
        batch.captions.part(own),
        batch.samples[own],
        batch.drawn_variants[own],
        0,
    )


def start(config, stage, ranks, universal=False, folder=None):
    path = ROOT / f"configs/deepspeed/zero{stage}.json"
    if folder:  # with what a user may have added
        content = json.loads(path.read_text())
        content["zero_optimization"] |= MORE
        path = folder / f"zero{stage}_{ranks.rank}.json"
        path.write_text(json.dumps(content))
    settings = engine_settings(path, config, ranks)
    settings["checkpoint"] = {"load_universal": universal}
    return laclip.engine.start_engine(new_model(config), config, settings, ranks)


def weights(engine, stage) -> dict[str, torch.Tensor]:
    import deepspeed

    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def train(
    engine, config, stage, ranks, steps, spoil=lambda batch: None, meanwhile=lambda: None
) -> list[tuple]:
    """(loss, logit_scale, gradient norm, applied) of each step."""
    found = []
    loss_scale = LossScale(config.train.precision, config.train.global_batch_size, TOO_HIGH)
    for index in steps:
        batch = own_part(global_batch(index, config.train.global_batch_size), ranks)
        spoil(batch)
        for group in engine.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group.get("lr_scale", 1.0)
        result = train_step(engine, batch, config, ranks, stage, loss_scale, meanwhile)
        found.append((*result.numbers(), result.gradient_norm(), result.applied))
    return found


def run_matrix(ranks) -> dict:
    found = {}
    for stage in STAGES:
        for precision, size in (("fp32", 0), ("bf16", 0), ("fp16", 0), ("fp16", 4)):
            micro = f"train.micro_batch_size={size}"
            config = configure(f"train.precision={precision}", micro, BEYOND_THE_CLAMP)
            engine = start(config, stage, ranks)
            steps = train(engine, config, stage, ranks, range(MATRIX_STEPS))
            found[stage, precision, size] = steps, weights(engine, stage)
    return found


def run_fp16(ranks) -> list[tuple]:
    config = configure("train.precision=fp16")
    return train(start(config, 1, ranks), config, 1, ranks, range(FP16_STEPS))


def run_shapes(ranks, micro_batch_sizes) -> dict:
    """Plain gradient descent, as AdamW would hide a gradient of the wrong size."""
    build_optimizer = laclip.engine.build_optimizer
    laclip.engine.build_optimizer = lambda model, **_: torch.optim.SGD(model.parameters())
    found = {}
    for stage in STAGES:
        for size in micro_batch_sizes:
            config = configure(f"train.micro_batch_size={size}", batch=LARGE_BATCH)
            engine = start(config, stage, ranks)
            steps = train(engine, config, stage, ranks, range(SHAPE_STEPS))
            found[stage, ranks.world_size, size] = steps, weights(engine, stage)
    laclip.engine.build_optimizer = build_optimizer
    return found


def run_guards(ranks) -> dict:
    """The last rank alone meets an infinite pixel, and later an infinite gradient."""
    found = {}
    last = ranks.rank == ranks.world_size - 1
    for stage in STAGES:
        for size in (0, 4):
            config = configure(f"train.micro_batch_size={size}")
            engine = start(config, stage, ranks)
            now = []

            def spoil(batch, now=now):
                now[:] = [batch.index]
                if last and batch.index == BAD_LOSS:
                    batch.images[0, 0, 0, 0] = float("inf")

            def spoil_gradient(_module, _inputs, features, now=now):
                if last and now == [BAD_GRADIENT] and features.requires_grad:
                    features.register_hook(lambda gradient: gradient * float("inf"))

            engine.module.text.register_forward_hook(spoil_gradient)
            steps = train(engine, config, stage, ranks, range(GUARD_STEPS), spoil)
            found[stage, size] = steps, weights(engine, stage)
    return found


def run_events(ranks) -> dict:
    """The order in which the towers run and the network is started and awaited, by micro-batch."""
    from laclip.kernels import gather

    events: list[str] = []

    def watch(name, start_work):
        def started(*arguments, **options):
            work = start_work(*arguments, **options)
            if not options.get("async_op"):
                return work
            events.append(f"{name} started")
            wait = work.wait

            class Watched:
                def wait(self):
                    events.append(f"{name} awaited")
                    return wait()

            return Watched()

        return started

    originals = gather._all_gather, gather._reduce_scatter
    gather._all_gather = watch("gather", gather._all_gather)
    gather._reduce_scatter = watch("scatter", gather._reduce_scatter)
    found = {}
    for size in (0, 4):
        config = configure(f"train.micro_batch_size={size}")
        engine = start(config, 1, ranks)
        assert not engine.tput_timer.config.enabled  # it would wait for the GPU at every forward
        for process_group in dist.distributed_c10d._world.pg_map:
            backend = process_group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == datetime.timedelta(minutes=11)
        for name in ("text", "image"):
            tower = getattr(engine.module, name)
            tower.register_forward_hook(lambda *_, name=name: events.append(f"{name} forward"))
            tower.projection.weight.register_hook(
                lambda _, name=name: events.append(f"{name} backward")
            )
        train(engine, config, 1, ranks, range(1))
        events.clear()
        prepare = partial(events.append, "next batch")
        train(engine, config, 1, ranks, range(1, 2), meanwhile=prepare)
        found[size] = list(events)
    gather._all_gather, gather._reduce_scatter = originals
    return found


def run_elastic(ranks, folder: Path) -> dict:
    """Go on from what another number of ranks saved, then save."""
    found = {}
    for name, (stages, overrides) in ELASTIC.items():
        for stage in stages:
            config = configure(*overrides)
            checkpoints = folder / f"stage_{stage}{name}"
            newest = newest_checkpoint(checkpoints, ranks)
            if newest is None:
                first, engine = 0, start(config, stage, ranks, folder=folder)
            else:
                first = newest[1]["step"]
                with fit_checkpoint(*newest, stage, ranks) as source:
                    # Other weights to begin with: all must come from the checkpoint.
                    other = configure(*overrides, "run.seed=7")
                    universal = source != newest[0]
                    engine = start(other, stage, ranks, universal, folder)
                    load_checkpoint(engine, source, *newest, ranks)
            steps = train(engine, config, stage, ranks, range(first, first + ELASTIC_STEPS))
            state = {"step": first + ELASTIC_STEPS, "score": None}
            save_checkpoint(engine, checkpoints, state, stage, ranks)
            left = sorted(path.name for path in checkpoints.glob("*") if path.suffix != ".py")
            # Parameters that a module read of another one: ZeRO-3 counts them as its own from then
            # on, and a run that went on ended with a "tracing error".
            foreign = [
                place
                for place, module in engine.module.named_modules()
                if getattr(module, "_external_params", None)
            ]
            found[stage, name] = steps, weights(engine, stage), left, foreign
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ranks = find_ranks()
    laclip.engine.connect(configure(), ranks)
    found = {"elastic": run_elastic(ranks, folder)}
    if ranks.world_size == 1:
        try:
            fit_checkpoint(*newest_checkpoint(folder / "stage_1", ranks), 2, ranks)
        except JointError as error:
            found["refused"] = str(error)
        found["shapes"] = run_shapes(ranks, (0, 16))
        found["fp16"] = run_fp16(ranks)
    elif ranks.world_size == 2:
        found["shapes"] = run_shapes(ranks, (16,))
        found["fp16"] = run_fp16(ranks)
        found["matrix"] = run_matrix(ranks)
        found["guards"] = run_guards(ranks)
        found["events"] = run_events(ranks)
    torch.save(found, folder / f"found_{ranks.world_size}_{ranks.rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
