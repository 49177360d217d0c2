"""CLIP's symmetric contrastive loss: 8 B^2 D floating-point operations, no B x B matrix in memory.

With s_ij = logit_scale * <image_i, text_j>, the loss is the mean over i of
(row_lse_i + column_lse_i) / 2 - s_ii. The pairs' own logits are left out of every big sum and of
the gradient block G, and their terms added in O(B D): at late training they are nearly all of each
sum, and rounding them would drown what is left. Vectors of length B are float64: they cost nothing,
hold exp(100) without a shift, and add up across ranks.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from laclip.kernels import chunked, reference
from laclip.kernels.gather import AverageGradient, GatheredFeatures, average, resolve
from laclip.kernels.inputs import (
    check_features,
    check_options,
    check_scalar,
    choose_implementation,
    never_traced,
    packed,
)
from laclip.kernels.products import full_precision, product


def block_source(implementation: str, features: torch.Tensor) -> Any:
    """The module that does the matrix work: triton is imported where it is used."""
    if implementation == "chunked":
        return chunked
    from laclip.kernels import triton_blocks

    triton_blocks.check_device(features)
    return triton_blocks


class Problem(NamedTuple):
    """What forward and backward both need; text is `[variants, batch, dim]`."""

    image: torch.Tensor
    text: torch.Tensor
    logit_scale: torch.Tensor
    gathered: GatheredFeatures | None
    label_smoothing: float
    chunk_rows: int
    blocks: Any

    @property
    def all_texts(self) -> torch.Tensor:
        if self.gathered is None:
            return self.text
        texts = self.gathered.wait()
        return texts if texts.dim() == 3 else texts[None]

    @property
    def first_column(self) -> int:
        return 0 if self.gathered is None else self.gathered.rank * len(self.image)


class Sums(NamedTuple):
    """What the backward takes from the forward: vectors of length B, nothing larger."""

    row_log_sum: torch.Tensor  # [variants, batch] float64, pairs included
    column_log_sum: torch.Tensor  # [variants, all ranks' batch] float64, pairs included
    pair_gradient: torch.Tensor  # [variants, batch] fp32: dL/ds_ii times 2 * batch * variants
    scale_sum: torch.Tensor  # 0-d float64: the pairs' and the smoothing's share of d logit_scale
    image_mean: torch.Tensor | None  # [dim] fp32, over all ranks
    text_mean: torch.Tensor | None  # [variants, dim] fp32, over all ranks
    flags: list[torch.Tensor | None]  # one a variant: see triton_blocks.log_sums


def forward_sums(problem: Problem) -> tuple[torch.Tensor, Sums]:
    """The loss (0-d fp32) and what its backward needs: 2 B^2 D."""
    image, text, blocks = problem.image, problem.text, problem.blocks
    batch, first, smoothing = len(image), problem.first_column, problem.label_smoothing
    group = None if problem.gathered is None else problem.gathered.group
    scale = problem.logit_scale.double()
    cosine32 = torch.stack([blocks.pair_cosines(image, variant) for variant in text])
    swept = [
        blocks.log_sums(image, variant, problem.logit_scale, pairs, first, problem.chunk_rows)
        for variant, pairs in zip(problem.all_texts, cosine32)
    ]
    cosine = cosine32.double()
    pair = cosine * scale
    row = torch.stack([sums[0] for sums in swept])
    column = torch.stack([sums[1] for sums in swept])
    if group is not None:
        own = slice(first, first + batch)
        parts = torch.stack([column.exp(), torch.zeros_like(column)])
        parts[1, :, own] = pair.exp()
        dist.all_reduce(parts, group=group)
        column, column_full = parts[0, :, own].log(), (parts[0] + parts[1]).log()
    off = torch.stack([row, column])
    full = torch.logaddexp(off, pair)
    if group is None:
        column_full = full[1]
    loss = (full.mean(0) - pair).mean()
    pair_gradient = -(off - full).exp().sum(0)
    scale_sum = (pair_gradient * cosine).sum()
    image_mean = text_mean = None
    if smoothing:
        image_sum, text_sum = image.sum(0, dtype=torch.float32), text.sum(1, dtype=torch.float32)
        text_mean = problem.all_texts.mean(1, dtype=torch.float32)
        image_mean = image_sum / batch
        if group is not None:
            dist.all_reduce(image_mean, group=group)
            image_mean /= dist.get_world_size(group)
        smooth = 2 * cosine.sum() - (text_mean @ image_sum + text_sum @ image_mean).sum()
        loss = loss + smoothing / (2 * batch * len(text)) * scale * smooth
        scale_sum = scale_sum + smoothing * smooth
    loss = (loss + 0 * loss).float()  # infinity becomes NaN
    return loss, Sums(
        full[0],
        column_full,
        pair_gradient.float(),
        scale_sum,
        image_mean,
        text_mean,
        [sums[2] for sums in swept],
    )


def backward_products(
    problem: Problem,
    sums: Sums,
    gradient: torch.Tensor,
    needed: tuple[bool, bool, bool],
    output_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of image, text and logit_scale, those that are `needed`: 6 B^2 D.

    Across ranks the text's part is on its way when this returns, and a zero stands in for it.
    output_dtype: the features' own by default; fp32 shows them before they are rounded.
    """
    image, text, blocks = problem.image, problem.text, problem.blocks
    all_texts, gathered, first = problem.all_texts, problem.gathered, problem.first_column
    batch, variants = len(image), len(text)
    dtype = output_dtype or image.dtype
    need_image, need_text, need_scale = needed
    gain, smoothing = chunked.GAIN[image.dtype], problem.label_smoothing
    share = gradient.double() / (2 * batch * variants)
    factor = (share * problem.logit_scale / gain).float()
    coefficients = (sums.pair_gradient + 2 * smoothing) * gain
    image_gradient = image.new_empty(image.shape, dtype=dtype) if need_image else None
    text_sum = None
    if need_text:
        text_sum = image.new_empty(all_texts.shape, dtype=torch.float32)
    scale_sum = sums.scale_sum
    columns = all_texts.shape[1]
    log_sums = torch.cat([sums.row_log_sum, sums.column_log_sum], 1)
    terms = blocks.softmax_terms(log_sums, problem.logit_scale, columns, image.dtype)
    text_operand = chunked.operand(all_texts, image) if need_image else None
    row_terms, column_terms = terms[..., :batch], terms[..., batch:]
    for start in range(0, batch, problem.chunk_rows):
        rows = slice(start, min(start + problem.chunk_rows, batch))
        part = image[rows]
        part_operand = chunked.operand(part, image) if need_text else None
        image_sum = part.new_empty(part.shape, dtype=torch.float32) if need_image else None
        for v in range(variants):
            block, block_sum = blocks.softmax_gradient(
                part,
                all_texts[v],
                row_terms[:, v, rows],
                column_terms[:, v],
                problem.logit_scale,
                first + start,
                sums.flags[v],
            )
            scale_sum = scale_sum + block_sum
            if image_sum is not None:
                product(block, text_operand[v], image_sum, accumulate=v > 0)
            if text_sum is not None:
                product(block.T, part_operand, text_sum[v], accumulate=start > 0)
            del block
        if image_gradient is not None:
            mean = None
            if sums.text_mean is not None:
                mean = sums.text_mean.sum(0) * (2 * smoothing * gain)
            blocks.combine(
                image_sum, coefficients[:, rows], text[:, rows], mean, factor, image_gradient[rows]
            )
    del text_operand  # as large as the text gradient, which is made now
    scale_gradient = (share * scale_sum).float() if need_scale else None
    if scale_gradient is not None and gathered is not None:
        # Before the text's part is on its way: it would have to wait for that.
        scale_gradient = average(scale_gradient, gathered.group)
    text_gradient = None
    if text_sum is not None:
        mean = None
        if sums.image_mean is not None:
            mean = sums.image_mean * (2 * smoothing * gain)
        own = slice(first, first + batch)
        text_factor = factor if gathered is None else torch.ones_like(factor)
        text_gradient = torch.empty_like(text, dtype=dtype) if gathered is None else None
        for v in range(variants):
            source = text_sum[v, own]
            target = source if text_gradient is None else text_gradient[v]
            blocks.combine(
                source,
                coefficients[v : v + 1],
                image[None],
                mean,
                text_factor,
                target,
            )
        if gathered is not None:
            gathered.start_reduce_scatter(
                text_sum if gathered.local.dim() == 3 else text_sum[0], factor
            )
            text_gradient = text.new_zeros(()).expand(text.shape)
    return image_gradient, text_gradient, scale_gradient


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, gathered, label_smoothing, chunk_rows, blocks):
        variants = text if text.dim() == 3 else text[None]
        problem = Problem(
            packed(image),
            packed(variants),
            logit_scale.detach(),
            gathered,
            label_smoothing,
            chunk_rows,
            blocks,
        )
        with full_precision(image):
            loss, sums = forward_sums(problem)
        if any(ctx.needs_input_grad):
            *vectors, flags = sums
            ctx.save_for_backward(
                problem.image, problem.text, problem.logit_scale, *vectors, *flags
            )
            ctx.rest, ctx.text_shape = problem[3:], text.shape
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, text, scale, *saved = ctx.saved_tensors
        vectors = len(Sums._fields) - 1
        sums = Sums._make([*saved[:vectors], saved[vectors:]])
        with full_precision(gradient):
            image, text, scale = backward_products(
                Problem(image, text, scale, *ctx.rest), sums, gradient, ctx.needs_input_grad[:3]
            )
        text = None if text is None else text.reshape(ctx.text_shape)
        return image, text, scale, None, None, None, None


@never_traced
def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor | GatheredFeatures,
    logit_scale: torch.Tensor,
    *,
    group: Any = None,
    label_smoothing: float = 0.0,
    chunk_rows: int = 4096,
    implementation: str = "auto",
) -> torch.Tensor:
    """The symmetric cross-entropy of images and texts over the global batch.

    With s_ij = logit_scale * <image_i, text_j> over a global batch of B pairs,

        loss = 1/(2B) sum_i [ log sum_j exp(s_ij) - s_ii  +  log sum_j exp(s_ji) - s_ii ].

    With M variants of each text (LaCLIP-MT) it is the mean over variants v of the same between the
    images and that variant's texts:

        loss = 1/M sum_v 1/(2B) sum_i [ log sum_j exp(s^v_ij) - s^v_ii
                                      + log sum_j exp(s^v_ji) - s^v_ii ].

    The image-to-text half is the paper's (arXiv 2305.20088, multi-text loss); that each variant
    is its own softmax in the text-to-image half too, the paper leaves open, and is our choice.

    image_features: `[batch, dim]`, unit length, bf16, fp16 or fp32 (float64: the reference alone);
        dim a multiple of 8. Need not be contiguous. On a GPU the backward takes bf16 features as
        fp16: an element beyond 65,504 gives gradients that are not finite.
    text_features: `[batch, dim]` or `[variants, batch, dim]`, same dtype and device; or what
        start_gather returned for it.
    logit_scale: 0-d fp32 (float64 beside float64), already exponentiated; at most 100 for the
        accuracy stated in benchmarks/LOG.md.
    group: None for one process; else the ranks that share the batch, each with the same count of
        rows. Then the loss is the mean over this rank's rows and columns, and the mean over ranks
        of the losses and of the gradients (as data parallelism forms it) is the global batch's;
        logit_scale's gradient is that mean already, the same on every rank.
        The incoming gradient must be the same on all ranks.
    label_smoothing: 0 to 1, as in torch.nn.functional.cross_entropy, for rows and columns.
    chunk_rows: the backward holds a block of chunk_rows x B gradients, fp32 for fp32 features and
        fp16 for others (twice 4096 * B bytes); fewer rows, less memory and more launches.
    implementation: "auto" is "triton" on CUDA and "chunked" on a CPU ("reference" for float64);
        "triton"; "chunked" (plain products by blocks of rows, any device); "reference" (whole
        matrices in plain PyTorch).

    Returns a 0-d fp32 loss (float64 for float64). A feature or logit_scale that is not finite gives
    NaN. A tensor that asks for no gradient costs none. Differentiable once.
    Raises ValueError for shapes, dtypes or devices that disagree, an empty batch, and on all ranks
    when the ranks disagree about batch or dim (looked at once, at the group's first call).
    """
    text, gathered = resolve(image_features, text_features, group)
    check_features(image_features, text)
    check_scalar("logit_scale", logit_scale, image_features)
    check_options(label_smoothing, chunk_rows)
    implementation = choose_implementation(implementation, image_features)
    if implementation == "reference":
        group = None if gathered is None else gathered.group
        if gathered is not None:
            logit_scale = AverageGradient.apply(logit_scale, group)
        with full_precision(image_features):
            return reference.clip_loss(
                image_features, text, logit_scale, group=group, label_smoothing=label_smoothing
            )
    return _ClipLoss.apply(
        image_features,
        text,
        logit_scale,
        gathered,
        float(label_smoothing),
        chunk_rows,
        block_source(implementation, image_features),
    )
