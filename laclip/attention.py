"""Attention over rows of tokens, and how captions are laid out as rows."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from laclip.captions import PackedCaptions

CAPTION_STEP = 8  # captions are grouped by length, rounded up to a multiple of this
CAPTION_PORTIONS = 32  # and their groups by size: a multiple of one part in so many of the batch
CAPTION_PRIORITY = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# PyTorch prefers flash to cuDNN; on Hopper cuDNN is the faster one at these lengths. But it plans
# anew, for tens of milliseconds, for every shape that it has not seen: captions come in hundreds.
IMAGE_PRIORITY = [SDPBackend.CUDNN_ATTENTION, *CAPTION_PRIORITY]


class Layout(NamedTuple):
    """How the rows of a tower's activations form sequences.

    Either `groups` names runs of (sequences, tokens) of equal length, or `bounds` holds where each
    sequence begins and the last one ends (int32 tensor for flash_attn, a mask for xformers).
    """

    groups: tuple[tuple[int, int], ...]
    bounds: Any = None
    longest: int = 0


class CaptionRows(NamedTuple):
    """The rows that a text tower computes for a batch of captions."""

    token_ids: Tensor  # int32 [rows]
    places: Tensor  # int32 [rows], each token's place in its caption
    pooled: Tensor  # int64 [captions], the row that a caption's features are read from
    layout: Layout


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, backend: str) -> Tensor:
    """Attention within each sequence of the layout; rows [rows, heads, head_dim] in and out.

    backend: sdpa, or flash_attn or xformers (bf16 and fp16 alone, else ValueError).
    """
    if backend != "sdpa" and v.dtype == torch.float32:
        raise ValueError(
            f"model.attention: {backend} computes in bf16 and fp16, found fp32. "
            'Set train.precision = "bf16", or model.attention = "sdpa"'
        )
    if backend == "flash_attn":
        return flash_attention(q, k, v, layout, causal)
    if backend == "xformers":
        return xformers_attention(q, k, v, layout)
    return sdpa_attention(q, k, v, layout, causal)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool) -> Tensor:
    """PyTorch's attention, a group at a time; is_causal, as a mask would rule out fast kernels."""
    sizes = [sequences * tokens for sequences, tokens in layout.groups]
    # split: its backward writes the gradients of all groups once, that of slices once a group.
    parts = zip(layout.groups, *(t.split(sizes) if len(sizes) > 1 else (t,) for t in (q, k, v)))
    outputs = []
    priority = CAPTION_PRIORITY if causal else IMAGE_PRIORITY
    with sdpa_kernel(priority, set_priority=True) if q.is_cuda else nullcontext():
        for group, *rows in parts:
            a, b, c = (t.unflatten(0, group).transpose(1, 2) for t in rows)
            output = F.scaled_dot_product_attention(a, b, c, is_causal=causal)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def flash_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool) -> Tensor:
    """The flash-attn package, by variable lengths where the layout has bounds."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    if layout.bounds is None:
        ((sequences, tokens),) = layout.groups
        q, k, v = (t.unflatten(0, (sequences, tokens)) for t in (q, k, v))
        return flash_attn_func(q, k, v, causal=causal).flatten(0, 1)
    return flash_attn_varlen_func(
        q, k, v, layout.bounds, layout.bounds, layout.longest, layout.longest, causal=causal
    )


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """The xformers package; its mask object carries the captions' bounds."""
    from xformers.ops import memory_efficient_attention

    if layout.bounds is not None:
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
        return memory_efficient_attention(q, k, v, attn_bias=layout.bounds).squeeze(0)
    ((sequences, tokens),) = layout.groups
    q, k, v = (t.unflatten(0, (sequences, tokens)) for t in (q, k, v))
    return memory_efficient_attention(q, k, v).flatten(0, 1)


def group_captions(captions: "PackedCaptions", tokens: int) -> CaptionRows:
    """Groups captions of similar length, each padded to its group's length by its last token.

    Each group but the shortest takes a whole number of thirty-seconds of the captions, the last of
    them from the next shorter ones: so a few numbers of rows serve all batches, and what is
    allocated or compiled for one serves the next. The result is a function of the captions alone,
    so that a batch always runs in the same shapes. tokens: the longest that a caption may be.
    """
    lengths, count = captions.lengths, len(captions.cu_seqlens) - 1
    histogram = torch.bincount((lengths - 1) // CAPTION_STEP).tolist()
    portion, longer, grouped = max(1, count // CAPTION_PORTIONS), 0, 0
    groups: list[tuple[int, int]] = []  # from the longest on
    for i in reversed(range(len(histogram))):
        longer += histogram[i]
        up_to = min(count, -(-longer // portion) * portion)
        if up_to > grouped:
            groups.append((up_to - grouped, min((i + 1) * CAPTION_STEP, tokens)))
            grouped = up_to
    groups.reverse()
    order = torch.argsort(lengths, stable=True)
    sizes = [size for size, _ in groups]
    begins, lasts = captions.cu_seqlens[:-1][order].split(sizes), (lengths[order] - 1).split(sizes)
    rows, places, ends, start = [], [], [], 0
    for (size, length), begin, last in zip(groups, begins, lasts):
        step = torch.arange(length, dtype=torch.int32)
        rows.append((begin[:, None] + torch.minimum(step, last[:, None])).flatten())
        places.append(step.repeat(size))
        ends.append(torch.arange(start, start + size * length, length) + last)
        start += size * length
    pooled = torch.empty(count, dtype=torch.int64)
    pooled[order] = torch.cat(ends)
    token_ids = captions.token_ids[torch.cat(rows)]
    return CaptionRows(token_ids, torch.cat(places), pooled, Layout(tuple(groups)))


def join_captions(captions: "PackedCaptions", tokens: int, backend: str) -> CaptionRows:
    """Captions end to end without any padding, for variable-length attention.

    tokens: the longest that a caption may be. backend: flash_attn or xformers. The layout has
    bounds.
    """
    lengths, begins = captions.lengths, captions.cu_seqlens[:-1]
    places = torch.arange(len(captions.token_ids), dtype=torch.int32)
    places -= begins.repeat_interleave(lengths)
    bounds: Any = captions.cu_seqlens
    if backend == "xformers":
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

        bounds = BlockDiagonalCausalMask.from_seqlens(lengths.tolist())
    pooled = captions.cu_seqlens[1:].long() - 1
    return CaptionRows(captions.token_ids, places, pooled, Layout((), bounds, tokens))
