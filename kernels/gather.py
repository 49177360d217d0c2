"""Text features of all ranks, gathered under whatever runs next, and their gradient's way back."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from laclip.kernels.inputs import never_traced

# torch 2.13 renamed both; 2.11 knows the old names alone.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_agreed: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def check_ranks_agree(name: str, features: torch.Tensor, group: Any) -> None:
    """At the group's first call: ValueError on every rank unless all have features of one shape.

    One small blocking all-gather, before anything that could fail on one rank alone.
    """
    if name in _agreed.setdefault(group, set()):
        return
    sizes = [0] * max(0, 3 - features.dim()) + list(features.shape)[:3]
    codes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    code = codes.index(features.dtype) if features.dtype in codes else -1
    mine = torch.tensor([features.dim(), *sizes, code], device=features.device)
    all_ranks = mine.new_empty(dist.get_world_size(group) * mine.numel())
    _all_gather(all_ranks, mine, group=group)
    rows = all_ranks.view(-1, mine.numel()).tolist()
    if any(row != rows[0] for row in rows):
        found = ", ".join(f"rank {r}: {row[4 - row[0] : 4]}" for r, row in enumerate(rows))
        raise ValueError(
            f"{name}: the ranks disagree, found {found}; expected one shape and one dtype on all "
            "ranks (drop or pad a last, smaller batch)"
        )
    _agreed[group].add(name)


class GatheredFeatures:
    """Features of all ranks on their way: made by start_gather, taken by the losses as text."""

    def __init__(self, features: torch.Tensor, group: Any):
        self.group = group
        self.world_size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        own = features.detach().contiguous()
        self._buffer = own.new_empty((self.world_size, *own.shape))
        self._work = _all_gather(
            self._buffer.view(-1, own.shape[-1]),
            own.view(-1, own.shape[-1]),
            group=group,
            async_op=True,
        )
        self._own = own  # held until the gather is done
        self._pending: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # Its node must not hold this object: it would hold itself, until Python looks for cycles.
        self.local = _AwaitGradient.apply(features, self._pending)

    def wait(self) -> torch.Tensor:
        """All ranks' features: `[world_size * batch, dim]`, or that with the variants first."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            world, *variants, batch, dim = self._buffer.shape
            if variants:
                self._buffer = self._buffer.transpose(0, 1).contiguous()
            self._buffer = self._buffer.view(*variants, world * batch, dim)
        return self._buffer

    def start_reduce_scatter(self, gradient: torch.Tensor, factor: torch.Tensor) -> None:
        """Sum `gradient` (fp32, shaped like wait()'s answer) over ranks; `factor` is applied after.

        The features' own backward node awaits it, so it runs under the backward of everything that
        was computed between start_gather and the loss.
        """
        *variants, total, dim = gradient.shape
        batch = total // self.world_size
        if variants:
            gradient = gradient.view(*variants, self.world_size, batch, dim).transpose(0, 1)
        source = gradient.reshape(-1, dim).contiguous()
        target = source.new_empty((source.shape[0] // self.world_size, dim))
        work = _reduce_scatter(target, source, group=self.group, async_op=True)
        self._pending.append((work, source, target, factor))


class _AwaitGradient(torch.autograd.Function):
    """The identity, whose gradient is what the losses sent through start_reduce_scatter."""

    @staticmethod
    def forward(ctx, features, pending):
        ctx.pending = pending
        return features.view_as(features)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        for work, _source, target, factor in ctx.pending:
            work.wait()
            gradient = gradient + (target.view(gradient.shape) * factor).to(gradient.dtype)
        ctx.pending.clear()
        return gradient, None


@never_traced
def start_gather(text_features: torch.Tensor, group: Any) -> GatheredFeatures:
    """Start to gather `text_features` from all ranks of `group`, and return at once.

    text_features: `[batch, dim]` or `[variants, batch, dim]`, the same shape on every rank.
    group: a process group (`torch.distributed.group.WORLD` for all ranks).

    Pass the result to a loss in place of its text features. Called between the text tower and the
    image tower, it hides the gather behind the image tower's forward, and the reduce-scatter of
    the text gradient behind the image tower's backward.

    Raises ValueError on all ranks if their shapes or dtypes differ (looked at once a group, at the
    first call), and for a tensor that no loss would take.
    """
    if group is None:
        raise ValueError("start_gather needs a process group; found None (one process: pass none)")
    check_ranks_agree("text_features", text_features, group)
    if text_features.dim() not in (2, 3) or text_features.numel() == 0:
        raise ValueError(
            f"text_features: found shape {list(text_features.shape)}, expected a non-empty "
            "[batch, dim] or [variants, batch, dim]"
        )
    return GatheredFeatures(text_features, group)


def resolve(
    image_features: torch.Tensor, text_features: torch.Tensor | GatheredFeatures, group: Any
) -> tuple[torch.Tensor, GatheredFeatures | None]:
    """This rank's text features, and the gather they belong to where there is a group."""
    if isinstance(text_features, GatheredFeatures):
        if group is not None and group is not text_features.group:
            raise ValueError("group: start_gather was given another process group than the loss")
        check_ranks_agree("image_features", image_features, text_features.group)
        return text_features.local, text_features
    if group is None:
        return text_features, None
    check_ranks_agree("image_features", image_features, group)
    gathered = start_gather(text_features, group)
    return gathered.local, gathered


def average(gradient: torch.Tensor, group: Any) -> torch.Tensor:
    """The mean over the ranks, of a number: what stops the scale at its bound asks for its sign."""
    dist.all_reduce(gradient, group=group)
    return gradient / dist.get_world_size(group)


class AverageGradient(torch.autograd.Function):
    """The identity, whose gradient is the mean over the ranks."""

    @staticmethod
    def forward(ctx, scalar, group):
        ctx.group = group
        return scalar.view_as(scalar)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return average(gradient.clone(), ctx.group), None


class GatherWithGradient(torch.autograd.Function):
    """The slow twin: a blocking all-gather along the batch, whose backward is an all-reduce."""

    @staticmethod
    def forward(ctx, features, group):
        ctx.group, ctx.batch = group, features.shape[-2]
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, features.contiguous(), group=group)
        return torch.cat(parts, dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.narrow(-2, dist.get_rank(ctx.group) * ctx.batch, ctx.batch), None
