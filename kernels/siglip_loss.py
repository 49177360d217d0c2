"""SigLIP's sigmoid loss in one pass: 6 B^2 D, its gradients made while the logits are at hand."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from laclip.kernels import chunked, reference
from laclip.kernels.clip_loss import Problem, block_source
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


def one_pass(
    problem: Problem, logit_bias: torch.Tensor, needed: tuple[bool, bool, bool, bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None], torch.Tensor]:
    """The loss, and the fp32 gradients of image, text, scale and bias that are `needed`.

    Across ranks the text's gradient is this rank's part for all ranks' texts, and lacks the third
    result, a factor.
    """
    image, text, blocks = problem.image, problem.text, problem.blocks
    all_texts, first = problem.all_texts, problem.first_column
    (batch, _), variants = image.shape, len(text)
    need_image, need_text = needed[:2]
    gain = chunked.GAIN[image.dtype]
    cosine = torch.stack([blocks.pair_cosines(image, variant) for variant in text]).double()
    pair = cosine * problem.logit_scale + logit_bias
    pair_gradient = -torch.sigmoid(-pair)
    coefficients = (pair_gradient * gain).float()
    # d logit_scale, the loss, d logit_bias: the pairs' share, then each block's.
    totals = torch.stack(
        [(pair_gradient * cosine).sum(), F.softplus(-pair).sum(), pair_gradient.sum()]
    )
    share = 1.0 / (batch * variants)
    factor = (share / gain * problem.logit_scale).float()
    image_sum = image.new_empty(image.shape, dtype=torch.float32) if need_image else None
    text_sum = image.new_empty(all_texts.shape, dtype=torch.float32) if need_text else None
    text_operand = chunked.operand(all_texts, image) if need_image else None
    image_operand = chunked.operand(image, image) if need_text else None
    for start in range(0, batch, problem.chunk_rows):
        rows = slice(start, min(start + problem.chunk_rows, batch))
        for v in range(variants):
            block, block_totals = blocks.sigmoid_gradient(
                image[rows],
                all_texts[v],
                problem.logit_scale,
                logit_bias,
                first + start,
                any(needed),
            )
            totals = totals + block_totals
            if image_sum is not None:
                product(block, text_operand[v], image_sum[rows], accumulate=v > 0)
            if text_sum is not None:
                product(block.T, image_operand[rows], text_sum[v], accumulate=start > 0)
            del block
    if image_sum is not None:
        blocks.combine(image_sum, coefficients, text, None, factor, image_sum)
    if text_sum is not None:
        # Across ranks the factor waits for the sum over ranks.
        text_factor = factor if problem.gathered is None else torch.ones_like(factor)
        for v in range(variants):
            own = text_sum[v, first : first + batch]
            blocks.combine(own, coefficients[v : v + 1], image[None], None, text_factor, own)
    scale_gradient, loss, bias_gradient = totals * share
    if needed[2] and problem.gathered is not None:
        scale_gradient = average(scale_gradient, problem.gathered.group)
    loss = (loss + 0 * loss).float()  # infinity becomes NaN
    return loss, [image_sum, text_sum, scale_gradient.float(), bias_gradient.float()], factor


class _SiglipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, image, text, logit_scale, logit_bias, gathered, chunk_rows, blocks, with_gradient
    ):
        variants = text if text.dim() == 3 else text[None]
        problem = Problem(
            packed(image),
            packed(variants),
            logit_scale.detach(),
            gathered,
            0.0,
            chunk_rows,
            blocks,
        )
        needed = tuple(with_gradient and need for need in ctx.needs_input_grad[:4])
        with full_precision(image):
            loss, gradients, factor = one_pass(problem, logit_bias.detach(), needed)
        ctx.save_for_backward(*gradients, factor)
        ctx.needed, ctx.gathered, ctx.text_shape, ctx.dtype = (
            needed,
            gathered,
            text.shape,
            image.dtype,
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        image, text, scale, bias, factor = ctx.saved_tensors
        need_image, need_text, need_scale, need_bias = ctx.needed

        def scaled(features):
            return torch.mul(features, gradient, out=torch.empty_like(features, dtype=ctx.dtype))

        image = scaled(image) if need_image else None
        if need_text and ctx.gathered is not None:
            ctx.gathered.start_reduce_scatter(
                text if len(ctx.text_shape) == 3 else text[0], gradient * factor
            )
            text = torch.zeros((), dtype=ctx.dtype, device=gradient.device).expand(ctx.text_shape)
        elif need_text:
            text = scaled(text).view(ctx.text_shape)
        else:
            text = None
        scale = scale * gradient if need_scale else None
        bias = bias * gradient if need_bias else None
        return image, text, scale, bias, None, None, None, None


@never_traced
def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor | GatheredFeatures,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    group: Any = None,
    chunk_rows: int = 4096,
    implementation: str = "auto",
) -> torch.Tensor:
    """The sigmoid loss of all image-text pairs over the global batch (arXiv 2303.15343).

    With x_ij = logit_scale * <image_i, text_j> + logit_bias and z_ij = 1 for pairs, -1 elsewhere,

        loss = -1/B sum_ij log sigmoid(z_ij x_ij),

    and with variants of each text the mean of it over variants. Where a gradient is asked for, it
    is made in the forward, block by block, and held in fp32 until the backward scales it.

    logit_bias: 0-d fp32 (float64 beside float64). The other arguments, what is returned and what
    is raised: as in clip_loss; chunk_rows x B is the size of the forward's block here.
    """
    text, gathered = resolve(image_features, text_features, group)
    check_features(image_features, text)
    check_scalar("logit_scale", logit_scale, image_features)
    check_scalar("logit_bias", logit_bias, image_features)
    check_options(0.0, chunk_rows)
    implementation = choose_implementation(implementation, image_features)
    if implementation == "reference":
        group = None if gathered is None else gathered.group
        if gathered is not None:
            logit_scale = AverageGradient.apply(logit_scale, group)
        with full_precision(image_features):
            return reference.siglip_loss(image_features, text, logit_scale, logit_bias, group=group)
    return _SiglipLoss.apply(
        image_features,
        text,
        logit_scale,
        logit_bias,
        gathered,
        chunk_rows,
        block_source(implementation, image_features),
        torch.is_grad_enabled(),
    )
