"""The Triton kernels of the losses: tiles of the similarity matrix that never reach memory.

All read features through host tensor descriptors (TMA), which fill with zeros beyond the edge. Two
rules keep the tensor cores fed on Hopper (a test holds both in the compiled code): no branch
touches an accumulator, or ptxas serialises the products; and sums down the columns stay in each
thread's registers until the sweep ends, since across lanes they cost 192 shuffles a thread and
tile. Hence every kernel runs twice: plain over all tiles, and as EDGE over the few (1-2 %) that
hold pairs or hang over the matrix, where everything is masked.

Where rows and columns are masked, a vector's alignment changes no instruction, so it must not ask
for another compilation: a batch that is no multiple of 4 would ask for several of each kernel.

Exponents are in log2 units. first_column: the column in which row 0's pair stands.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SOFTMAX = tl.constexpr(0)
ONLINE = tl.constexpr(1)
SIGMOID = tl.constexpr(2)


@triton.jit
def _scale_and_shift(logit_scale, margin):
    # exp(s * cosine - shift) neither overflows when summed over the batch nor, for s <= 81,
    # underflows at any cosine; margin = 87 - ln(batch).
    scale = tl.load(logit_scale)
    shift = tl.maximum(tl.abs(scale) - margin, 0.0)
    return scale * LOG2_E, shift * LOG2_E


@triton.jit
def _tile_product(
    images,
    texts,
    row,
    column,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, DIM, BLOCK_K):
        acc = tl.dot(images.load([row, k]), texts.load([column, k]).T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["rows", "columns", "first_column", "slot", "splits"])
def column_sweep(
    images,
    texts,
    row_parts,  # [column blocks, rows]
    column_parts,  # [slots, columns]
    logit_scale,
    rows,
    columns,
    first_column,
    margin,
    slot,
    splits,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PLAIN_M: tl.constexpr,  # BLOCK_M of the plain pass, a multiple of this one's
    EDGE: tl.constexpr,
):
    """Partial sums of exp(logit - shift) by rows and by columns, pairs left out.

    Program (n, split) owns BLOCK_N columns and sweeps its share of the row tiles. Plain, it steps
    over the tiles that may hold pairs; as EDGE it takes those alone, or all of a ragged last block.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    scale, shift = _scale_and_shift(logit_scale, margin)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    pair_start = tl.maximum(block * BLOCK_N - first_column, 0)
    pair_end = tl.minimum((block + 1) * BLOCK_N - first_column, rows)
    RATIO: tl.constexpr = PLAIN_M // BLOCK_M
    band_start = pair_start // PLAIN_M * RATIO
    band_end = tl.minimum(tl.cdiv(pair_end, PLAIN_M) * RATIO, row_tiles)
    band = tl.where(pair_end > pair_start, band_end - band_start, 0)
    if EDGE:
        ragged = (block + 1) * BLOCK_N > columns
        base = tl.where(ragged, 0, band_start)
        count = tl.where(ragged, row_tiles, band)
    else:
        base = 0
        count = row_tiles - band
    share = tl.cdiv(count, splits)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Per thread: a wgmma fragment holds rows r and r + 8 of each 16; no lane is crossed.
    column_sum = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, count), flatten=True):
        if EDGE:
            tile = base + step
        else:
            tile = step + tl.where(step >= band_start, band, 0)
        acc = _tile_product(
            images, texts, tile * BLOCK_M, block * BLOCK_N, DIM, BLOCK_M, BLOCK_N, BLOCK_K
        )
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if EDGE:
            keep = (row < rows)[:, None] & (column < columns)[None, :]
            keep = keep & ((row + first_column)[:, None] != column[None, :])
            weight = tl.where(keep, tl.exp2(acc * scale - shift), 0.0)
        else:
            bias = tl.where(row < rows, -shift, float("-inf"))
            weight = tl.exp2(acc * scale + bias[:, None])
        column_sum += tl.sum(tl.reshape(weight, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
        tl.store(row_parts + block.to(tl.int64) * rows + row, tl.sum(weight, 1), mask=row < rows)
    total = tl.sum(tl.reshape(column_sum, [BLOCK_M // 2, BLOCK_N]), 0)
    out = column_parts + (slot + split).to(tl.int64) * columns + column
    tl.store(out, total, mask=column < columns)


@triton.jit(
    do_not_specialize=["count", "length", "first_pair", "pairs"],
    do_not_specialize_on_alignment=["total", "shift_out", "pair_cosine"],
)
def add_parts(
    parts,  # [count, length]
    total,
    shift_out,
    pair_cosine,  # [pairs]; pair i belongs to place first_pair + i
    logit_scale,
    flag,
    count,
    length,
    first_pair,
    pairs,
    margin,
    lowest,
    BLOCK: tl.constexpr,
):
    """Add partial sums in order; raise the flag where a sum is too small or large to be trusted."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    scale, shift = _scale_and_shift(logit_scale, margin)
    value = tl.zeros((BLOCK,), tl.float32)
    source = parts + place
    for _ in range(count):
        value += tl.load(source, mask=inside, other=0.0)
        source += length
    tl.store(total + place, value, mask=inside)
    tl.store(shift_out + place, tl.zeros((BLOCK,), tl.float32) + shift, mask=inside)
    own = (place >= first_pair) & (place < first_pair + pairs)
    cosine = tl.load(pair_cosine + place - first_pair, mask=own, other=0.0)
    whole = value + tl.where(own, tl.exp2(cosine * scale - shift), 0.0)
    trusted = (whole > lowest) & (whole < 1.7e38)
    doubt = tl.max(tl.where(inside & (trusted == 0), 1, 0), 0)
    tl.store(flag, 1, mask=doubt > 0)


@triton.jit(
    do_not_specialize=["rows", "columns", "first_column"],
    do_not_specialize_on_alignment=["total", "shift_out"],
)
def online_sums(
    images,
    texts,
    total,
    shift_out,
    logit_scale,
    flag,
    rows,
    columns,
    first_column,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the flag is up: row sums under each row's own maximum, right for any finite logits."""
    raised = tl.load(flag) != 0
    scale = tl.load(logit_scale) * LOG2_E
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    value = tl.zeros((BLOCK_M,), tl.float32)
    for tile in tl.range(0, tl.where(raised, tl.cdiv(columns, BLOCK_N), 0)):
        acc = _tile_product(
            images,
            texts,
            tl.program_id(0) * BLOCK_M,
            tile * BLOCK_N,
            DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        keep = (column < columns)[None, :] & ((row + first_column)[:, None] != column[None, :])
        exponent = tl.where(keep, acc * scale, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(exponent, 1))
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        value = value * tl.exp2(highest - base) + tl.sum(tl.exp2(exponent - base[:, None]), 1)
        highest = new_highest
    tl.store(total + row, value, mask=(row < rows) & raised)
    tl.store(shift_out + row, highest, mask=(row < rows) & raised)


@triton.jit
def _gradient_slab(
    acc,
    row,
    column,
    block,
    row_start,
    column_start,
    row_term,
    column_term,
    row_base,
    column_base,
    scale,
    shift,
    bias,
    rows,
    columns,
    first_column,
    MODE: tl.constexpr,
    EDGE: tl.constexpr,
    GRADIENT: tl.constexpr,
    GAIN: tl.constexpr,
):
    """Write one slab of G; return its rows' sums of G * cosine, of losses and of G."""
    keep = True
    if EDGE:
        keep = (row < rows)[:, None] & (column < columns)[None, :]
        keep = keep & ((row + first_column)[:, None] != column[None, :])
    scale_sum = tl.zeros_like(row).to(tl.float32)
    loss_sum = scale_sum
    gradient_sum = scale_sum
    if MODE == SIGMOID:
        # With t = exp(-|x|): softplus = max(x, 0) + log(1 + t), sigmoid = 1 or t over 1 + t.
        # log(1 + t) / t on [0, 1] is a fitted polynomial, 3e-7 off at most, so that t far below
        # an ulp of 1 counts: there are B^2 of them. A square of rsqrt takes 3 instructions, a
        # division 8.
        exponent = acc * scale + bias
        power = tl.exp2(-tl.abs(exponent))
        inverse = tl.rsqrt(1.0 + power)
        inverse = inverse * inverse
        gradient = tl.where(exponent > 0, inverse, power * inverse)
        series = -0.008574676 * power + 0.044214193
        series = series * power - 0.10785368
        series = series * power + 0.17757024
        series = series * power - 0.24499612
        series = series * power + 0.33276176
        series = series * power - 0.49997449
        series = series * power + 0.99999982
        loss = series * power + tl.maximum(exponent * LN_2, 0.0)
        if EDGE:
            gradient = tl.where(keep, gradient, 0.0)
            loss = tl.where(keep, loss, 0.0)
        loss_sum = tl.sum(loss, 1)
        if GRADIENT:
            scale_sum = tl.sum(gradient * acc, 1)
            gradient_sum = tl.sum(gradient, 1)
            block.store([row_start, column_start], (gradient * GAIN).to(block.dtype))
    else:
        row_value = tl.load(row_term + row, mask=row < rows, other=0.0)
        column_value = tl.load(column_term + column, mask=column < columns, other=0.0)
        if MODE == SOFTMAX:
            gradient = tl.exp2(acc * scale - shift) * (row_value[:, None] + column_value[None, :])
        else:
            row_log = tl.load(row_base + row, mask=row < rows, other=0.0)
            column_log = tl.load(column_base + column, mask=column < columns, other=0.0)
            gradient = tl.exp2(acc * scale - row_log[:, None]) * row_value[:, None]
            gradient += tl.exp2(acc * scale - column_log[None, :]) * column_value[None, :]
        if EDGE:
            gradient = tl.where(keep, gradient, 0.0)
        scale_sum = tl.sum(gradient * acc, 1)
        block.store([row_start, column_start], gradient.to(block.dtype))
    return scale_sum, loss_sum, gradient_sum


@triton.jit(
    do_not_specialize=["edge_count", "rows", "columns", "first_column", "part_count", "programs"],
    do_not_specialize_on_alignment=["row_term", "column_term", "row_base", "column_base", "parts"],
)
def gradient_tiles(
    images,
    texts,
    block,  # descriptor of G, [rows, columns], in slabs of [BLOCK_M, BLOCK_N // SLABS]
    row_term,  # GAIN * 2 ^ (base - log2-sum) by rows, where SOFTMAX's base is the shift
    column_term,  # the same by columns
    row_base,  # ONLINE alone: log2-sums rounded to integers
    column_base,
    parts,  # [3, part_count]: sums of G * cosine by tiles taken, for SIGMOID of losses and of G too
    logit_scale,
    logit_bias,  # SIGMOID alone
    flag,  # SOFTMAX runs while it is down, ONLINE while it is up
    edges,  # [edge_count, 2] int32: the tiles that EDGE takes
    edge_count,
    rows,
    columns,
    first_column,
    margin,
    part_count,  # between the three
    programs,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLABS: tl.constexpr,  # 1 or 2: halves keep the sigmoid's many values within the registers
    MODE: tl.constexpr,
    EDGE: tl.constexpr,
    GRADIENT: tl.constexpr,
    GAIN: tl.constexpr,
):
    """G in its block's dtype, and fp32 sums over it; programs stay, tiles pass."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    scale, shift = _scale_and_shift(logit_scale, margin)
    bias = 0.0
    if MODE == SIGMOID:
        bias = tl.load(logit_bias) * LOG2_E
    if EDGE:
        tiles = edge_count
    else:
        tiles = row_tiles * column_tiles
    if MODE == SOFTMAX:
        tiles = tl.where(tl.load(flag) == 0, tiles, 0)
    if MODE == ONLINE:
        tiles = tl.where(tl.load(flag) == 0, 0, tiles)
    for t in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        if EDGE:
            m = tl.load(edges + 2 * t)
            n = tl.load(edges + 2 * t + 1)
        else:
            # Bands of 8 row tiles, so that what runs at once shares its operands in L2.
            band = t // (8 * column_tiles)
            height = tl.minimum(row_tiles - band * 8, 8)
            m = band * 8 + (t % (8 * column_tiles)) % height
            n = (t % (8 * column_tiles)) // height
        row_start = m * BLOCK_M
        column_start = n * BLOCK_N
        acc = _tile_product(images, texts, row_start, column_start, DIM, BLOCK_M, BLOCK_N, BLOCK_K)
        row = row_start + tl.arange(0, BLOCK_M)
        WIDTH: tl.constexpr = BLOCK_N // SLABS
        column = column_start + tl.arange(0, WIDTH)
        if SLABS == 2:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
        else:
            left = acc
        scale_sum, loss_sum, gradient_sum = _gradient_slab(
            left, row, column, block, row_start, column_start, row_term, column_term, row_base,
            column_base, scale, shift, bias, rows, columns, first_column, MODE, EDGE, GRADIENT,
            GAIN,
        )  # fmt: skip
        if SLABS == 2:
            more_scale, more_loss, more_gradient = _gradient_slab(
                right, row, column + WIDTH, block, row_start, column_start + WIDTH, row_term,
                column_term, row_base, column_base, scale, shift, bias, rows, columns,
                first_column, MODE, EDGE, GRADIENT, GAIN,
            )  # fmt: skip
            scale_sum += more_scale
            loss_sum += more_loss
            gradient_sum += more_gradient
        # A plain pass leaves the sums of its edge tiles to the EDGE pass, which masks them.
        edge = False
        if not EDGE:
            edge = ((m + 1) * BLOCK_M > rows) | ((n + 1) * BLOCK_N > columns)
            edge = edge | (
                (first_column + m * BLOCK_M < (n + 1) * BLOCK_N)
                & (first_column + (m + 1) * BLOCK_M > n * BLOCK_N)
            )
        part = parts + t
        # Sums without an axis: along axis 0 they cost 57 registers more on Hopper, and triton 3.6
        # fails to compile them for Blackwell.
        if GRADIENT:
            tl.store(part, tl.where(edge, 0.0, tl.sum(scale_sum)))
        if MODE == SIGMOID:
            tl.store(part + part_count, tl.where(edge, 0.0, tl.sum(loss_sum)))
            if GRADIENT:
                tl.store(part + 2 * part_count, tl.where(edge, 0.0, tl.sum(gradient_sum)))


@triton.jit(do_not_specialize=["rows"])
def pair_cosines(
    images, texts, out, rows, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """fp32 dot products of matching rows."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = row.to(tl.int64)[:, None] * DIM
    value = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, DIM, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (inner < DIM)[None, :]
        image = tl.load(images + start + inner[None, :], mask=inside, other=0.0).to(tl.float32)
        text = tl.load(texts + start + inner[None, :], mask=inside, other=0.0).to(tl.float32)
        value += tl.sum(image * text, 1)
    tl.store(out + row, value, mask=row < rows)


@triton.jit(
    do_not_specialize=["rows", "variants", "coefficient_stride", "other_stride"],
    do_not_specialize_on_alignment=["coefficients"],
)
def combine(
    product_sum,  # [rows, DIM] fp32
    coefficients,  # [variants, coefficient_stride] fp32
    others,  # [variants, rows, DIM], variants other_stride apart
    mean,  # [DIM] fp32
    factor,
    out,
    rows,
    variants,
    coefficient_stride,
    other_stride,
    HAS_MEAN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = factor * (product_sum + sum over v of coefficients[v] * others[v] - mean)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < rows)[:, None] & (inner < DIM)[None, :]
    place = row.to(tl.int64)[:, None] * DIM + inner[None, :]
    value = tl.load(product_sum + place, mask=inside, other=0.0)
    other = others + place
    coefficient = coefficients + row
    for _ in range(variants):
        weight = tl.load(coefficient, mask=row < rows, other=0.0)
        value += weight[:, None] * tl.load(other, mask=inside, other=0.0).to(tl.float32)
        coefficient += coefficient_stride
        other += other_stride
    if HAS_MEAN:
        value -= tl.load(mean + inner, mask=inner < DIM, other=0.0)[None, :]
    value *= tl.load(factor)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)
