"""The main job on a GPU: every ZeRO stage and precision, compiled or not, stopped and resumed."""

import shutil
import subprocess
import sys

import pytest
import torch
from train_job import ROOT, arguments, environment, losses, metrics, status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run(words, gpus):
    env = environment(gpus)
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("stage", "precision", "micro", "compiled"),
    [
        *((0, "fp32", 0, False), (0, "bf16", 0, True), (1, "bf16", 0, True)),
        *((1, "fp16", 8, False), (2, "bf16", 8, False), (3, "bf16", 0, True)),
    ],
)
def test_a_run_on_a_gpu_is_that_of_the_cpu_and_goes_on(
    tmp_path, stage, precision, micro, compiled, gpus=1
):
    options = [f"train.precision={precision}", f"train.micro_batch_size={micro}"]
    on_gpu, on_cpu = tmp_path / "gpu", tmp_path / "cpu"
    words = arguments(on_gpu, *options, f"train.compile={str(compiled).lower()}", stage=stage)
    output = run(words, gpus)
    assert gpus == 0 or "1 CUDA rank(s)" in output
    found = losses(on_gpu)
    assert status(on_gpu)["state"] == "finished"
    skipped = sum(record.get("skipped", False) for record in metrics(on_gpu))
    assert skipped <= (4 if precision == "fp16" else 0)  # while its scale is too large
    # Images are decoded and resized by others there: near, not equal.
    run(arguments(on_cpu, *options), 1000)
    assert found == pytest.approx(losses(on_cpu), abs=0.1)

    shutil.rmtree(on_gpu / "checkpoints" / "step_00000008")
    run([*words[:3], "--resume", str(on_gpu)], gpus)
    assert losses(on_gpu) == pytest.approx(found, abs=1e-3)
