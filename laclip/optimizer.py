"""AdamW with the parameter groups and the learning-rate schedule of CLIP training."""

import math
import re
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from laclip.config import Config


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Splits the trainable parameters by weight decay and by learning-rate scale.

    Tensors with fewer than two dimensions are not decayed, nor is anything of shape [1] (the
    scale and the bias of the logits have one dimension for DeepSpeed's sake). layer_decay < 1
    gives each block layer_decay times the rate of the block above it, the embeddings the least;
    the final norms, the projections and the logits' scale keep the full rate.

    Returns groups with "params", "names", "weight_decay" and "lr_scale": set a group's rate to
    schedule.rate(step) * group["lr_scale"].
    """
    depths = {
        prefix: len(blocks)
        for prefix, tower in model.named_children()
        if isinstance(blocks := getattr(tower, "blocks", None), nn.ModuleList)
    }
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        scale = layer_decay ** _layers_above(name, depths)
        group = groups.setdefault(
            (decay, scale),
            {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layers_above(name: str, depths: dict[str, int]) -> int:
    tower, _, rest = name.partition(".")
    if tower not in depths or rest.startswith(("norm.", "projection.")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", rest)
    return depths[tower] - int(block[1]) if block else depths[tower] + 1


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.5,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`, in its fused form where the device has one."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"}
    )


class Schedule(NamedTuple):
    """The learning rate of each step, from 0: linear from start to peak, then cosine to end.

    It is start at step 0, peak at warmup_steps, and end from total_steps on.
    """

    peak: float
    start: float
    end: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.end
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.end + (self.peak - self.end) * 0.5 * (1 + math.cos(math.pi * progress))


def schedule_of(config: "Config", num_samples: int) -> Schedule:
    """The schedule of a run over so many samples. Raises ValueError where they make no step."""
    batch, rates = config.train.global_batch_size, config.optimizer
    if batch > num_samples:
        raise ValueError(
            f"train.global_batch_size: {batch:,} is more than the {num_samples:,} samples of "
            "data.train. Lower it, or give more data"
        )
    total_steps = config.train.steps or round(config.train.epochs * num_samples / batch)
    if total_steps < 1:
        raise ValueError(
            f"train.epochs, train.steps: {num_samples:,} samples in batches of {batch:,} for "
            f"{config.train.epochs:g} epochs make no step. Give more of either"
        )
    warmup_steps = rates.warmup_steps or round(rates.warmup_epochs * num_samples / batch)
    return Schedule(rates.lr, rates.start_lr, rates.end_lr, warmup_steps, total_steps)
