"""The losses' matrix work by blocks of rows: plain products and elementwise steps, any device.

The slow twin of triton_blocks.py, function for function; the losses are written once over either.
"""

import torch
import torch.nn.functional as F

from laclip.kernels.products import product

# G is fp16 beside half-precision features, bf16 ones too: eight times as exact as bf16, and tensor
# cores are as fast. It is carried times 2^14: 1/B would be subnormal at B = 32k, and 2 * 2^14, the
# largest possible, still fits.
GAIN = {torch.float16: 2.0**14, torch.bfloat16: 2.0**14, torch.float32: 1.0}


def operand(values: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """G, or features beside it, as a product takes them: fp16 on a GPU, but beside fp32 features.

    fp16 holds unit-length bf16 features to 2^-25. On a CPU nothing is gained by rounding.
    """
    half = features.is_cuda and features.dtype != torch.float32
    return values.to(torch.float16) if half else values


def _cosines(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(image), len(text), dtype=torch.float32, device=image.device)
    product(image, text.T, out)
    return out


def pair_cosines(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """`[batch]` fp32 dot products of matching rows."""
    return torch.linalg.vecdot(image.float(), text.float())


def _log_sum(logits: torch.Tensor, dim: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """logsumexp in float64 (fp32 would round it by 4e-6 near 100), through `out`."""
    top = logits.amax(dim, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
    return torch.sub(logits, top, out=out).exp_().sum(dim).double().log_() + top.squeeze(dim)


def log_sums(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    pair_cosine: torch.Tensor,
    first_column: int,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Log-sum-exps of the logits' rows and columns without the pairs' own logits, in float64.

    Row i's pair stands in column first_column + i. The third result, and the use of pair_cosine,
    are triton_blocks' own.
    """
    rows, columns = [], []
    for first in range(0, len(image), chunk_rows):
        logits = _cosines(image[first : first + chunk_rows], text).mul_(logit_scale)
        logits.diagonal(first_column + first).fill_(-torch.inf)
        rows.append(_log_sum(logits, 1))
        columns.append(_log_sum(logits, 0, out=logits))
        del logits
    return torch.cat(rows), torch.stack(columns).logsumexp(0), None


def softmax_terms(
    log_sum: torch.Tensor, logit_scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """Log-sums with the pairs' logits in them, `[2, ...]` fp32, as softmax_gradient takes them.

    An integer, and exp of what it is too large by: rounded to fp32, a log-sum near 100 would err
    by 4e-6, alike along a whole row.
    """
    base = log_sum.round()
    return torch.stack([base, (base - log_sum).exp()]).float()


def softmax_gradient(
    image: torch.Tensor,
    text: torch.Tensor,
    row_terms: torch.Tensor,
    column_terms: torch.Tensor,
    logit_scale: torch.Tensor,
    first_column: int,
    flag: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAIN * (exp(s_ij - row_i) + exp(s_ij - column_j)), zero for pairs; its sum with cosines."""
    cosines = _cosines(image, text)
    logits = cosines * logit_scale
    (row_base, row_factor), (column_base, column_factor) = row_terms, column_terms
    gradient = (logits - row_base[:, None]).exp_().mul_(row_factor[:, None])
    gradient.addcmul_(logits.sub_(column_base).exp_(), column_factor)
    gradient.diagonal(first_column).zero_()
    scale_sum = cosines.mul_(gradient).sum(dtype=torch.float64)
    return operand(gradient.mul_(GAIN[image.dtype]), image), scale_sum


def sigmoid_gradient(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    first_column: int,
    with_gradient: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """sigmoid(x_ij) of all but the pairs, times GAIN, where x = scale * cosine + bias.

    The second result holds three float64 sums over the same: sigmoid(x) * cosine, softplus(x),
    sigmoid(x).
    """
    cosines = _cosines(image, text)
    logits = cosines * logit_scale + logit_bias
    losses = F.softplus(logits)
    losses.diagonal(first_column).zero_()
    loss_sum = losses.sum(dtype=torch.float64)
    del losses
    if not with_gradient:
        return None, torch.stack([loss_sum, loss_sum, loss_sum])
    gradient = logits.sigmoid_()
    gradient.diagonal(first_column).zero_()
    bias_sum = gradient.sum(dtype=torch.float64)
    scale_sum = cosines.mul_(gradient).sum(dtype=torch.float64)
    block = operand(gradient.mul_(GAIN[image.dtype]), image)
    return block, torch.stack([scale_sum, loss_sum, bias_sum])


def combine(
    product_sum: torch.Tensor,
    coefficients: torch.Tensor,
    others: torch.Tensor,
    mean: torch.Tensor | None,
    factor: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out = factor * (product_sum + sum over v of coefficients[v, i] * others[v, i] - mean).

    product_sum: `[rows, dim]` fp32, overwritten. coefficients: `[variants, rows]` fp32. others:
    `[variants, rows, dim]`. mean: `[dim]` fp32. out: `[rows, dim]`; may be product_sum itself.
    """
    for coefficient, other in zip(coefficients, others):
        product_sum.addcmul_(coefficient[:, None], other.float())
    if mean is not None:
        product_sum -= mean
    out.copy_(product_sum.mul_(factor))
