"""The losses' matrix work as fused Triton kernels: launches, buffers, and the sums that follow.

The fast twin of chunked.py, function for function. No function reads a device value on the host.
"""

import math
from functools import lru_cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from laclip.kernels import triton_kernels as kernels
from laclip.kernels.chunked import GAIN
from laclip.kernels.launch_table import Tile, device_facts, sweep_splits, tile

SOFTMAX, ONLINE, SIGMOID = 0, 1, 2
LN_2 = math.log(2.0)


def check_device(features: torch.Tensor) -> None:
    """Raise ValueError where no Triton kernel can run."""
    if not features.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"implementation='triton' needs features on a GPU, found {features.device}: use "
            "implementation='auto' (or set TRITON_INTERPRET=1 before Python starts, to test)"
        )


def _described(features: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(features, [rows, columns])


def _margin(columns: int) -> float:
    """A sum of `columns` exponentials of at most this overflows nowhere; see _scale_and_shift."""
    return 87.0 - math.log(columns)


def _options(shape: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": shape.rows,
        "BLOCK_N": shape.columns,
        "BLOCK_K": shape.inner,
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def pair_cosines(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`[batch]` fp32 dot products of matching rows."""
    rows, dim = image.shape
    out = torch.empty(rows, dtype=torch.float32, device=image.device)
    kernels.pair_cosines[(triton.cdiv(rows, 8),)](
        image, text, out, rows, DIM=dim, BLOCK_M=8, BLOCK_K=128
    )
    return out


def log_sums(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    pair_cosine: torch.Tensor,
    first_column: int,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As chunked.log_sums; the third result is a device flag.

    The flag is up (1) where one shift for all logits lost a sum: it was beyond fp32, or so small
    that what underflowed could matter (more than 1e-6 of it). Kernels with a running maximum then
    serve this step; while it is down they return at once.
    """
    (rows, dim), columns = image.shape, len(text)
    plain, edge = (tile(name, image, rows, columns) for name in ("sweep", "sweep_edge"))
    _, processors = device_facts(image.device)
    blocks, full_blocks = triton.cdiv(columns, plain.columns), columns // plain.columns
    row_tiles = triton.cdiv(rows, plain.rows)
    splits = sweep_splits(max(1, full_blocks), row_tiles, processors)
    # A ragged last block is swept by EDGE alone, all of it: shared out, or it would come last.
    edge_splits = 1 if full_blocks == blocks else min(32, row_tiles)
    row_parts = image.new_empty(blocks, rows, dtype=torch.float32)
    column_parts = image.new_zeros(splits + edge_splits, columns, dtype=torch.float32)
    margin = _margin(columns)
    for shape, grid, slot, is_edge in (
        (plain, (full_blocks, splits), 0, False),
        (edge, (blocks, edge_splits), splits, True),
    ):
        if grid[0]:
            kernels.column_sweep[grid](
                _described(image, shape.rows, shape.inner),
                _described(text, shape.columns, shape.inner),
                row_parts,
                column_parts,
                logit_scale,
                rows,
                columns,
                first_column,
                margin,
                slot,
                grid[1],
                DIM=dim,
                PLAIN_M=plain.rows,
                EDGE=is_edge,
                **_options(shape),
            )
    flag = torch.zeros(1, dtype=torch.int32, device=image.device)
    sums = image.new_empty(2, rows + columns, dtype=torch.float32)
    row, column = sums[:, :rows], sums[:, rows:]
    lowest = columns * 2.0**-106
    for parts, (total, shift), first_pair in (
        (row_parts, row, 0),
        (column_parts, column, first_column),
    ):
        count, length = parts.shape
        kernels.add_parts[(triton.cdiv(length, 128),)](
            parts,
            total,
            shift,
            pair_cosine,
            logit_scale,
            flag,
            count,
            length,
            first_pair,
            rows,
            margin,
            lowest,
            BLOCK=128,
            num_warps=4,
        )
    shape = tile("online", image, rows, columns)
    for mine, others, (total, shift), offset in (
        (image, text, row, first_column),
        (text, image, column, -first_column),
    ):
        kernels.online_sums[(triton.cdiv(len(mine), shape.rows),)](
            _described(mine, shape.rows, shape.inner),
            _described(others, shape.columns, shape.inner),
            total,
            shift,
            logit_scale,
            flag,
            len(mine),
            len(others),
            offset,
            DIM=dim,
            **_options(shape),
        )
    total, shift = sums.double()
    log_sum = total.log2_().add_(shift).mul_(LN_2)
    return log_sum[:rows], log_sum[rows:], flag


def softmax_terms(
    log_sum: torch.Tensor, logit_scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Full log-sums as gradient_tiles takes them: `[3, ...]` fp32.

    A term for SOFTMAX; a term and its base for ONLINE. The base is an integer, so that nothing of
    the log-sum, near 100 at worst, is lost to rounding: it would err alike along a whole row.
    """
    shift = (logit_scale.double().abs() - _margin(columns)).clamp_min(0.0)
    log2_sum = log_sum / LN_2
    base = log2_sum.round()
    gain = GAIN[dtype]
    # exp2 of a tensor is compiled at its first call on a GPU; exp is there.
    rest = ((base - log2_sum) * LN_2).exp()
    terms = (shift - log_sum).exp() * gain, rest * gain, base
    return torch.stack(terms).float()


@lru_cache(maxsize=4096)
def _edge_tiles(
    rows: int, columns: int, first_column: int, plain: Tile, edge: Tile, device: torch.device
) -> torch.Tensor:
    """`[count, 2]` int32: the EDGE tiles within those plain tiles that hold pairs or overhang."""
    m = torch.arange(triton.cdiv(rows, plain.rows))[:, None] * plain.rows
    n = torch.arange(triton.cdiv(columns, plain.columns))[None, :] * plain.columns
    hit = (m + plain.rows > rows) | (n + plain.columns > columns)
    hit |= (first_column + m < n + plain.columns) & (first_column + m + plain.rows > n)
    by_rows, by_columns = plain.rows // edge.rows, plain.columns // edge.columns
    hit = hit.repeat_interleave(by_rows, 0).repeat_interleave(by_columns, 1)
    hit = hit[: triton.cdiv(rows, edge.rows), : triton.cdiv(columns, edge.columns)]
    # nonzero answers column by column.
    return hit.nonzero().to(torch.int32).contiguous().to(device)


def _gradient_pass(
    image: torch.Tensor,
    text: torch.Tensor,
    block: torch.Tensor,
    modes: list[tuple[int, str, str, list[torch.Tensor]]],
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    flag: torch.Tensor,
    first_column: int,
    with_gradient: bool = True,
) -> torch.Tensor:
    """Fill `block` with G, for each mode plain tiles and then EDGE tiles; three float64 sums.

    A mode is its number, the names of its two tiles, and its terms by rows and by columns and
    their bases.
    """
    (rows, dim), columns = image.shape, len(text)
    _, processors = device_facts(image.device)
    passes: list[tuple[int, Tile, int, torch.Tensor | None, list[torch.Tensor]]] = []
    for mode, plain_name, edge_name, terms in modes:
        plain, edge = (tile(name, image, rows, columns) for name in (plain_name, edge_name))
        edges = _edge_tiles(rows, columns, first_column, plain, edge, image.device)
        tiles = triton.cdiv(rows, plain.rows) * triton.cdiv(columns, plain.columns)
        passes.append((mode, plain, tiles, None, terms))
        passes.append((mode, edge, len(edges), edges, terms))
    # A mode that is off writes nothing, hence zeros.
    parts = image.new_zeros(3, sum(taken[2] for taken in passes), dtype=torch.float32)
    start = 0
    for mode, shape, count, edge_list, terms in passes:
        programs = min(count, processors * shape.per_processor)
        kernels.gradient_tiles[(programs,)](
            _described(image, shape.rows, shape.inner),
            _described(text, shape.columns, shape.inner),
            _described(block, shape.rows, shape.columns // shape.slabs),
            *terms,
            parts[:, start:],
            logit_scale,
            logit_bias,
            flag,
            flag if edge_list is None else edge_list,
            count,
            rows,
            columns,
            first_column,
            _margin(columns),
            parts.shape[1],
            programs,
            DIM=dim,
            SLABS=shape.slabs,
            MODE=mode,
            EDGE=edge_list is not None,
            GRADIENT=with_gradient,
            GAIN=GAIN[image.dtype],
            **_options(shape),
        )
        start += count
    return parts.sum(1, dtype=torch.float64)


def _empty_block(image: torch.Tensor, columns: int) -> torch.Tensor:
    """Room for G, in the dtype of chunked.GAIN: rows padded to 16 bytes, as descriptors want it."""
    dtype = torch.float32 if image.dtype == torch.float32 else torch.float16
    return image.new_empty(len(image), -(-columns // 8) * 8, dtype=dtype)[:, :columns]


def softmax_gradient(
    image: torch.Tensor,
    text: torch.Tensor,
    row_terms: torch.Tensor,
    column_terms: torch.Tensor,
    logit_scale: torch.Tensor,
    first_column: int,
    flag: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As chunked.softmax_gradient, on the terms of softmax_terms."""
    block = _empty_block(image, len(text))
    row, row_online, row_base = row_terms
    column, column_online, column_base = column_terms
    modes = [
        (SOFTMAX, "softmax", "softmax_edge", [row, column, row_base, column_base]),
        (
            ONLINE,
            "softmax_edge",
            "softmax_edge",
            [row_online, column_online, row_base, column_base],
        ),
    ]
    sums = _gradient_pass(image, text, block, modes, logit_scale, logit_scale, flag, first_column)
    return block, sums[0] / GAIN[image.dtype]


def sigmoid_gradient(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    first_column: int,
    with_gradient: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """As chunked.sigmoid_gradient."""
    block = _empty_block(image, len(text) if with_gradient else 256)
    nothing = torch.zeros(1, dtype=torch.int32, device=image.device)
    # The sigmoid has no terms by rows or columns.
    modes = [(SIGMOID, "sigmoid", "sigmoid_edge", [logit_scale] * 4)]
    sums = _gradient_pass(
        image, text, block, modes, logit_scale, logit_bias, nothing, first_column, with_gradient
    )
    return block if with_gradient else None, sums


def combine(
    product_sum: torch.Tensor,
    coefficients: torch.Tensor,
    others: torch.Tensor,
    mean: torch.Tensor | None,
    factor: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """As chunked.combine; `out` may be product_sum itself."""
    rows, dim = product_sum.shape
    kernels.combine[(triton.cdiv(rows, 8), triton.cdiv(dim, 256))](
        product_sum,
        coefficients,
        others,
        product_sum if mean is None else mean,
        factor,
        out,
        rows,
        len(others),
        coefficients.stride(0),
        others.stride(0),
        HAS_MEAN=mean is not None,
        DIM=dim,
        BLOCK_M=8,
        BLOCK_K=256,
    )
