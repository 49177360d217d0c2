"""The benchmark of the losses runs where there is no GPU, and its records print as tables."""

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_loss_benchmark_writes_whole_records_and_a_table(tmp_path):
    out = tmp_path / "loss.jsonl"
    options = "--device cpu --dtype fp32 --dims 64 --sizes 64 --error-batch 64 --seconds 0.01"
    run(str(BENCHMARKS / "loss.py"), *options.split(), "--out", str(out))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [r for r in records if r["name"].startswith("laclip chunked")]
    assert [r["name"].split(": ")[1] for r in ours] == [
        "forward", "backward", "both", "forward", "both",
    ]  # fmt: skip
    for record in ours:
        assert record["shape"] == {"batch": 64, "dim": 64}
        assert 0 < record["p20"] <= record["median"] <= record["p80"]
        assert record["throughput"] > 0 and record["peak_memory_mib"] >= 0
        assert record["machine"] and record["commit"] and record["versions"]["torch"]
        assert record["extra"]["error random"] < 1e-5
    table = run(str(BENCHMARKS / "harness.py"), str(out))
    assert table.count("laclip chunked: both") == 2
    run(str(BENCHMARKS / "loss.py"), "--out", str(out), "--plot", str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_every_tile_to_be_tuned_gives_the_same_gradients(monkeypatch, device):
    from laclip.kernels import clip_loss, launch_table
    from laclip.kernels.testing import gradients, inputs

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from tune_loss import CANDIDATES

    tensors = inputs("clip", "random", 200, 64, torch.bfloat16, device, 20.0)
    expected = gradients(clip_loss, tensors, implementation="triton")
    for name, tiles in CANDIDATES["clip"].items():
        with monkeypatch.context() as patch:
            for table in ("HOPPER", "HOPPER_SMALL"):
                patch.setattr(launch_table, table, getattr(launch_table, table) | tiles)
            found = gradients(clip_loss, tensors, implementation="triton")
        for mine, other in zip(found, expected):
            torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-6, msg=name)


def test_a_case_that_raises_is_recorded_and_the_others_go_on():
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
from harness import Case, compare, table
calls = []
late = lambda turn: calls.append(turn) or 1 / (len(calls) < 6)
cases = [Case("none", lambda turn: [][0]), Case("late", late), Case("good", lambda turn: turn)]
print(table(compare("test", cases, shape={{}}, dtype="fp32", device="cpu", seconds=0.01)))
"""
    table = run("-c", script)
    assert "| none | IndexError: list index out of range | - | - |" in table
    assert "| late | ZeroDivisionError: division by zero | - |" in table
    assert "calls/s" in table
