"""What the kernels compile to for an H100, read from the machine code; needs no GPU.

python -m laclip.kernels.resources          a table
python -m laclip.kernels.resources --json   one JSON object a kernel and line, for tests
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from laclip.kernels import triton_kernels as kernels
from laclip.kernels.chunked import GAIN
from laclip.kernels.launch_table import FLOAT32, HOPPER, HOPPER_SMALL, OTHER, Tile
from laclip.kernels.triton_blocks import ONLINE, SIGMOID, SOFTMAX

POINTERS = {"flag": "*i32", "edges": "*i32"}
NUMBERS = {"margin": "fp32", "lowest": "fp32"}
INTEGERS = frozenset(
    name
    for kernel in (
        kernels.column_sweep,
        kernels.add_parts,
        kernels.online_sums,
        kernels.gradient_tiles,
        kernels.pair_cosines,
        kernels.combine,
    )
    for name in kernel.do_not_specialize
)


def variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """(name, kernel, types, constants, warps, stages) of everything that the losses launch."""
    tables = {"": HOPPER, " small": HOPPER_SMALL}
    for dtype in ("bf16", "fp16", "fp32"):
        seen: set[tuple[str, Tile]] = set()
        for label, table in tables.items() if dtype != "fp32" else [("", FLOAT32)]:
            for name, modes in (
                ("sweep", (None,)),
                ("sweep_edge", (None,)),
                ("online", (None,)),
                ("softmax", (SOFTMAX,)),
                ("softmax_edge", (SOFTMAX, ONLINE)),
                ("sigmoid", (SIGMOID,)),
                ("sigmoid_edge", (SIGMOID,)),
            ):
                shape = table[name]
                if (name, shape) in seen:
                    continue
                seen.add((name, shape))
                for mode in modes:
                    yield from _matrix_kernels(f"{dtype} {name}{label}", dtype, name, shape, mode)
        small = {"DIM": 768, "BLOCK_M": 8}
        plain = {"images": f"*{dtype}", "texts": f"*{dtype}", "others": f"*{dtype}"}
        yield (
            f"{dtype} pair_cosines", kernels.pair_cosines, plain, small | {"BLOCK_K": 128}, 4, 3,
        )  # fmt: skip
        combined = small | {"BLOCK_K": 256, "HAS_MEAN": True}
        yield (
            f"{dtype} combine", kernels.combine, plain | {"out": f"*{dtype}"}, combined, 4, 3,
        )  # fmt: skip
    yield "add_parts", kernels.add_parts, {}, {"BLOCK": 128}, 4, 3


def _matrix_kernels(
    label: str, dtype: str, name: str, shape: Tile, mode: int | None
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    block, gain = ("fp32", 1.0) if dtype == "fp32" else ("fp16", GAIN[torch.float16])
    types = {
        "images": f"tensordesc<{dtype}[{shape.rows},{shape.inner}]>",
        "texts": f"tensordesc<{dtype}[{shape.columns},{shape.inner}]>",
        "block": f"tensordesc<{block}[{shape.rows},{shape.columns // shape.slabs}]>",
    }
    constants: dict[str, Any] = {
        "DIM": 768,
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.columns,
        "BLOCK_K": shape.inner,
    }
    edge = name.endswith("_edge")
    if name == "online":
        yield label, kernels.online_sums, types, constants, shape.warps, shape.stages
    elif mode is None:
        constants |= {"EDGE": edge, "PLAIN_M": 128 if edge and dtype != "fp32" else shape.rows}
        yield label, kernels.column_sweep, types, constants, shape.warps, shape.stages
    else:
        constants |= {"SLABS": shape.slabs, "MODE": mode, "GAIN": gain}
        # The fallback runs both its passes on the tiles of softmax_edge.
        for masked in (True, False) if mode == ONLINE else (edge,):
            for gradient in (True, False) if mode == SIGMOID else (True,):
                suffix = " online" * (mode == ONLINE) + " plain" * (mode == ONLINE and not masked)
                suffix += "" if gradient else " loss alone"
                yield (
                    label + suffix,
                    kernels.gradient_tiles,
                    types,
                    constants | {"EDGE": masked, "GRADIENT": gradient},
                    shape.warps,
                    shape.stages,
                )


def compiled_for(
    generation: int,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> Any:
    """What triton makes of a kernel for sm_`generation`."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = types.get(name) or NUMBERS.get(name) or POINTERS.get(name, "*fp32")
            aligned = not kernel.params[place].do_not_specialize_on_alignment
            if signature[name].startswith("*") and aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", generation, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def others(generation: int) -> Iterator[tuple[str, int]]:
    """Name and shared memory of every bf16 matrix kernel, compiled for another GPU than Hopper."""
    for name, shape in OTHER.items():
        modes = {"softmax": (SOFTMAX,), "softmax_edge": (SOFTMAX, ONLINE)}
        modes |= dict.fromkeys(("sigmoid", "sigmoid_edge"), (SIGMOID,))
        for mode in modes.get(name, (None,)):
            for label, *variant in _matrix_kernels(name, "bf16", name, shape, mode):
                yield label, compiled_for(generation, *variant).metadata.shared


def measure(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> dict[str, Any]:
    """Compile for sm_90 and read registers, spills, shared memory and instructions."""
    compiled = compiled_for(90, kernel, types, constants, warps, stages)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])
        assert target is not None
        report = _tool("ptxas", "-v", f"--gpu-name={target[1]}", str(ptx), "-o", f"{folder}/out")
        sass = _tool("nvdisasm", "-c", str(cubin))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    assert spills is not None and registers is not None, report
    used, shared = int(registers[1]), compiled.metadata.shared
    by_registers = 65536 // (-(-used // 8) * 8 * 32 * warps)
    by_shared = 228 * 1024 // (shared + 1024)
    loop = loop_instructions(sass)
    return {
        "registers": used,
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": shared,
        "per_processor": min(by_registers, by_shared, 64 // warps),
        "wgmma": len(re.findall(r"\bHGMMA", sass)),
        "serialized": "serialized" in report,
        "loop": sum(loop.values()),
        "loop_shuffles": loop["SHFL"],
        "loop_exp2": loop["MUFU.EX2"],
    }


def _tool(name: str, *arguments: str) -> str:
    # triton's own choice: containers, and torch.compile, name another assembler than triton's.
    path = getattr(triton.knobs.nvidia, name).path
    run = subprocess.run([path, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def loop_instructions(sass: str) -> Counter[str]:
    """Counts of what the innermost loop that holds both products and exponentials executes."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    loops = []
    for end, text in enumerate(instructions):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        if jump and labels.get(jump[1], end) < end:
            body = instructions[labels[jump[1]] : end + 1]
            if any("HGMMA" in t for t in body) and any("MUFU.EX2" in t for t in body):
                loops.append(body)
    counts: Counter[str] = Counter()
    for text in min(loops, key=len, default=[]):
        opcode = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].rstrip(";")
        counts["MUFU.EX2" if opcode.startswith("MUFU.EX2") else opcode.split(".")[0]] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--dtypes", default="bf16,fp16,fp32", help="which to compile")
    options = parser.parse_args()
    wanted = options.dtypes.split(",")
    if triton.knobs.runtime.interpret:
        sys.exit("resources: unset TRITON_INTERPRET, the interpreter compiles nothing")
    if not options.json:
        print(
            "| kernel | tile, warps, stages | registers | spills | shared B | CTA/SM | wgmma | ",
            end="",
        )
        print("loop instr. | SHFL | EX2 |\n" + "| --- " * 10 + "|")
    for name, kernel, types, constants, warps, stages in variants():
        if name.split()[0] not in wanted and name != "add_parts":
            continue
        found = measure(kernel, types, constants, warps, stages)
        if options.json:
            product = "_K" in str(constants) and name.split()[-1] not in ("pair_cosines", "combine")
            print(json.dumps({"name": name, "product": product} | found), flush=True)
            continue
        tile = "x".join(str(constants[k]) for k in constants if k.startswith("BLOCK"))
        wgmma = f"{found['wgmma']}{' SERIALIZED' * found['serialized']}"
        print(
            f"| {name} | {tile}, {warps}, {stages} | {found['registers']} | {found['spill_bytes']} "
            f"| {found['shared_bytes']:,} | {found['per_processor']} | {wgmma} | {found['loop']} "
            f"| {found['loop_shuffles']} | {found['loop_exp2']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
