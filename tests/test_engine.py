"""The engine against plain PyTorch: ZeRO stages, precisions, ranks, micro-batches, restarts.

The ranks run tests/engine_ranks.py: first two, then one, then four, each going on from what the
others saved.
"""

import contextlib
import math
import os
import sys
from pathlib import Path

import engine_ranks as ranks_program
import pytest
import torch
import torch.nn.functional as F
from train_job import run_ranks

SCRIPT = Path(ranks_program.__file__)
STAGES = ranks_program.STAGES


def run_on(world_size: int, folder: Path) -> list[dict]:
    """What each rank found."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    codes, outputs = run_ranks([sys.executable, SCRIPT, folder], environment, world_size)
    assert not any(codes), "\n".join(outputs)
    files = [folder / f"found_{world_size}_{rank}.pt" for rank in range(world_size)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """What the ranks found, by their number; in the order of the restarts."""
    folder = tmp_path_factory.mktemp("engine")
    return {world_size: run_on(world_size, folder) for world_size in (2, 1, 4)}


def plain_loop(
    config, steps, *, sgd=False, skipped=(), scale=1.0
) -> tuple[list, dict[str, torch.Tensor]]:
    """(loss, logit_scale, gradient norm) of each step, and the weights, of one process's loop."""
    model = ranks_program.new_model(config)
    depth_scale = {"image": config.model.vision.depth, "text": config.model.text.depth}
    groups = []
    for name, parameter in model.named_parameters():
        tower, _, rest = name.partition(".")
        above = 0
        if tower in depth_scale and not rest.startswith(("norm.", "projection.")):
            block = rest.split(".")
            below = int(block[1]) if block[0] == "blocks" else -1
            above = depth_scale[tower] - below
        if parameter.requires_grad:
            rate = ranks_program.LEARNING_RATE * 0.8**above
            decay = 0.5 if parameter.ndim >= 2 else 0.0
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    if sgd:
        optimizer = torch.optim.SGD(model.parameters(), lr=ranks_program.LEARNING_RATE)
    else:
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=ranks_program.EPS)
    autocast = contextlib.nullcontext()
    if config.train.precision != "fp32":
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        autocast = torch.autocast("cpu", kinds[config.train.precision])
    found = []
    for index in steps:
        batch = ranks_program.global_batch(index, config.train.global_batch_size)
        keys = torch.from_numpy(batch.samples.view("int64") ^ index)
        optimizer.zero_grad()
        with autocast:
            images, texts, logit_scale = model(batch.images, batch.captions, keys)
        logits = logit_scale * images.float() @ texts.float().T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        (scale * loss).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient /= scale
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        if index not in skipped:
            optimizer.step()
        found.append((loss.item(), logit_scale.item(), norm.item()))
    return found, {name: p.detach() for name, p in model.named_parameters()}


def compare(mine, plain, *, loss, norm, weights):
    """Hold steps and weights against a plain loop's; absolute bounds, but for the norm's."""
    steps, final = mine
    expected, expected_final = plain
    losses = [step[0] for step in expected]
    assert [step[0] for step in steps] == pytest.approx(losses, abs=loss, rel=2e-6)
    assert [step[2] for step in steps] == pytest.approx([step[2] for step in expected], rel=norm)
    worst = max(float((final[name] - value).abs().max()) for name, value in expected_final.items())
    assert worst < weights


@pytest.fixture(scope="module")
def plain_matrix():
    result = {}
    for precision in ("fp32", "bf16"):
        config = ranks_program.configure(
            f"train.precision={precision}", ranks_program.BEYOND_THE_CLAMP
        )
        result[precision] = plain_loop(config, range(ranks_program.MATRIX_STEPS))
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_equals_a_plain_loop_in_fp32(found, plain_matrix, stage):
    for rank in found[2]:
        mine = rank["matrix"][stage, "fp32", 0]
        compare(mine, plain_matrix["fp32"], loss=1e-5, norm=1e-4, weights=1e-4)
        scales = [step[1] for step in mine[0]]
        expected = [step[1] for step in plain_matrix["fp32"][0]]
        assert scales == pytest.approx(expected, rel=1e-6)
        assert scales[:2] == pytest.approx([100, 100], rel=1e-6) and scales[-1] < 99.5


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_follows_a_plain_loop_in_bf16(found, plain_matrix, stage):
    for rank in found[2]:
        mine = rank["matrix"][stage, "bf16", 0]
        losses, plain = ([step[0] for step in run[0]] for run in (mine, plain_matrix["bf16"]))
        # At a scale of 100 the rounding of 2 x 8 samples against that of 16 grows with the steps.
        assert losses[0] == pytest.approx(plain[0], rel=1e-4)
        assert losses == pytest.approx(plain, rel=6e-2)
        same = rank["matrix"][0, "bf16", 0]
        compare(mine, same, loss=1e-4, norm=1e-4, weights=1e-4)
        # bf16 has no number between 99.5 and 100: a rounded scale could not move like this.
        scales = [step[1] for step in mine[0]]
        assert scales[:2] == pytest.approx([100, 100], rel=1e-6)
        expected = [step[1] for step in plain_matrix["bf16"][0]]
        assert scales == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [0, 4])
def test_every_zero_stage_follows_a_plain_loop_in_fp16(found, stage, size):
    """The loss scale starts so high that gradients overflow, and falls until they do not."""
    steps, _ = found[2][0]["matrix"][stage, "fp16", size]
    skipped = {index for index, step in enumerate(steps) if not step[3]}
    assert skipped and skipped == set(range(len(skipped))) and len(skipped) < 10
    config = ranks_program.configure("train.precision=fp16", ranks_program.BEYOND_THE_CLAMP)
    plain, _ = plain_loop(config, range(ranks_program.MATRIX_STEPS), skipped=skipped, scale=64.0)
    assert [step[0] for step in steps] == pytest.approx([step[0] for step in plain], rel=2e-2)
    assert [step[1] for step in steps] == pytest.approx([step[1] for step in plain], rel=1e-4)
    mine, expected = (
        [run[index][2] for index in range(len(skipped), 20)] for run in (steps, plain)
    )
    assert mine == pytest.approx(expected, rel=2e-2)


def test_in_fp16_any_number_of_ranks_skips_the_same_steps(found):
    one, two = (found[world_size][0]["fp16"] for world_size in (1, 2))
    skipped = [not step[3] for step in one]
    assert skipped[0] and not all(skipped) and skipped == [not step[3] for step in two]
    assert [step[0] for step in two] == pytest.approx([step[0] for step in one], rel=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_do_not_depend_on_ranks_and_micro_batches(found, stage):
    """1 x 64, 4 x 16 and 2 ranks x 2 x 16, patch dropout replayed; SGD, no clipping."""
    config = ranks_program.configure(batch=ranks_program.LARGE_BATCH)
    plain = plain_loop(config, range(ranks_program.SHAPE_STEPS), sgd=True)
    shapes = found[1][0]["shapes"] | found[2][0]["shapes"]
    for ranks, size in ((1, 0), (1, 16), (2, 16)):
        compare(shapes[stage, ranks, size], plain, loss=1e-5, norm=1e-5, weights=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [0, 4])
def test_all_ranks_skip_what_is_not_finite_on_one(found, stage, size):
    bad = {ranks_program.BAD_LOSS, ranks_program.BAD_GRADIENT}
    config = ranks_program.configure()
    plain = plain_loop(config, range(ranks_program.GUARD_STEPS), skipped=bad)
    for rank in found[2]:
        steps, final = rank["guards"][stage, size]
        assert [step[3] for step in steps] == [index not in bad for index in range(len(steps))]
        assert not math.isfinite(steps[ranks_program.BAD_LOSS][0])
        good = [index for index in range(len(steps)) if index not in bad]
        mine = [steps[index] for index in good], final
        compare(mine, ([plain[0][index] for index in good], plain[1]), loss=1e-5, norm=1e-4,
                weights=1e-5)  # fmt: skip


def test_the_network_runs_under_the_image_tower(found):
    for rank in found[2]:
        assert rank["events"][0] == [
            "text forward",
            "gather started",
            "image forward",
            "gather awaited",
            "next batch",
            "scatter started",
            "image backward",
            "scatter awaited",
            "text backward",
        ]
        whole = rank["events"][4]  # two micro-batches of four on each of two ranks
        assert whole[:10] == [
            "text forward",
            "text forward",
            "gather started",
            "image forward",
            "image forward",
            "gather awaited",
            "next batch",
            "scatter started",
            "image backward",
            "scatter awaited",
        ]
        # The first micro-batch alone is encoded again: the last one's graph was kept.
        assert whole.count("text forward") == whole.count("image forward") == 3
        assert whole.count("next batch") == 1


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (stage, name)
        for name, (stages, _) in ranks_program.ELASTIC.items()
        for stage in stages
        if name != "skipped"
    ],
)
def test_a_run_goes_on_under_another_number_of_ranks(found, stage, name):
    """2 -> 1 -> 4 ranks, towers locked or not, against a loop without a stop."""
    config = ranks_program.configure(*ranks_program.ELASTIC[name][1])
    plain = plain_loop(config, range(3 * ranks_program.ELASTIC_STEPS))
    runs = [found[world_size][0]["elastic"][stage, name] for world_size in (2, 1, 4)]
    steps = [step for run in runs for step in run[0]]
    compare((steps, runs[-1][1]), plain, loss=1e-5, norm=1e-4, weights=1e-5)
    count = ranks_program.ELASTIC_STEPS
    assert runs[-1][2] == [f"step_{count * part:08d}" for part in (1, 2, 3)]
    assert not any(run[3] for run in runs)


def test_a_run_goes_on_under_another_number_of_ranks_before_its_first_update(found):
    first = dict(ranks_program.new_model(ranks_program.configure()).named_parameters())
    for world_size in (2, 1, 4):
        steps, weights, *_ = found[world_size][0]["elastic"][3, "skipped"]
        assert not any(step[3] for step in steps)
        assert all(torch.equal(weights[name], value) for name, value in first.items())


def test_checkpoints_of_another_zero_stage_are_refused_by_name(found):
    assert "was written under ZeRO stage 1, this job runs under stage 2" in found[1][0]["refused"]
