"""What the kernels compile to for an H100: what keeps them fast, held without a GPU."""

import json
import os
import subprocess
import sys

import pytest


def run(*arguments: str) -> list:
    """The JSON lines that a Python process without the interpreter prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    return {row["name"]: row for row in run("-m", "laclip.kernels.resources", "--json")}


def test_every_kernel_compiles_without_spills(compiled):
    assert len(compiled) > 40
    assert {name: row["spill_bytes"] for name, row in compiled.items() if row["spill_bytes"]} == {}


def test_every_kernel_fits_in_shared_memory(compiled):
    assert all(row["shared_bytes"] <= 227 * 1024 for row in compiled.values())
    assert all(row["per_processor"] >= 1 for row in compiled.values())


def test_half_precision_products_use_wgmma_and_are_not_serialized(compiled):
    products = {n: r for n, r in compiled.items() if r["product"] and not n.startswith("fp32")}
    assert len(products) >= 28
    assert [name for name, row in products.items() if not row["wgmma"]] == []
    assert [name for name, row in products.items() if row["serialized"]] == []


def test_plain_passes_cross_few_lanes(compiled):
    # Column sums across lanes would be 192 shuffles a tile.
    for name, limit in (("sweep", 16), ("softmax", 16), ("sigmoid", 48)):
        for dtype in ("bf16", "fp16"):
            row = compiled[f"{dtype} {name}"]
            assert row["loop_exp2"] > 0, "no loop with products and exponentials was found"
            assert row["loop_shuffles"] <= limit


def test_two_programs_of_the_sigmoid_share_a_processor(compiled):
    assert compiled["bf16 sigmoid"]["per_processor"] == 2
    assert compiled["fp16 sigmoid"]["per_processor"] == 2


def test_the_report_is_of_the_assembler_that_triton_uses(tmp_path, monkeypatch):
    other, calls = tmp_path / "ptxas", tmp_path / "calls"
    (own,) = run("-c", "import json, triton; print(json.dumps(triton.knobs.nvidia.ptxas.path))")
    other.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {own} "$@"\n')
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    run("-m", "laclip.kernels.resources", "--json", "--dtypes", "none")
    assert sum("-v" in call.split() for call in calls.read_text().splitlines()) == 2


@pytest.mark.parametrize("generation", [80, 100])
def test_other_gpus_than_hopper_are_served(generation):
    script = f"""
import json
from laclip.kernels.resources import others
print(json.dumps(dict(others({generation}))))
"""
    (shared,) = run("-c", script)
    assert len(shared) == 11
    assert {name: used for name, used in shared.items() if used > 99 * 1024} == {}
