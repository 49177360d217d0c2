"""One update of the model, or none where the numbers are not sound; the same on every rank.

The engine is DeepSpeed's; it is used through its forward, backward and step.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from laclip.config import Config
from laclip.kernels import clip_loss, siglip_loss, start_gather
from laclip.model import to_device
from laclip.parallel import Ranks

if TYPE_CHECKING:
    from laclip.loader import LoadedBatch


class LossScale:
    """What fp16's gradients are multiplied by, so that small ones are not lost; 1 without fp16.

    It is halved where they overflow, and doubled after 2000 steps in which they did not.
    """

    def __init__(self, precision: str, saved: tuple[float, int] = (65536.0, 0)):
        self.active = precision == "fp16"
        self.value, self.good_steps = saved if self.active else (1.0, 0)

    @property
    def of_a_rank(self) -> float:
        """What a rank multiplies by: its gradients, of which the ranks take the mean, are as many
        times those of the batch as there are ranks, and would overflow that much sooner."""
        return self.value / dist.get_world_size() if self.active else 1.0

    def update(self, applied: bool) -> None:
        if not self.active:
            return
        self.good_steps = self.good_steps + 1 if applied else 0
        if not applied:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % 2000 == 0:
            self.value *= 2


class StepResult:
    """What a step gave. Its numbers come from the device when they are asked for."""

    def __init__(self, loss: torch.Tensor, logit_scale: torch.Tensor, ranks: Ranks):
        numbers = torch.stack([loss.detach().float(), logit_scale.detach().float()])
        if ranks.world_size > 1:
            dist.all_reduce(numbers)
        # Copied before the backward is launched: they are here when the step is done, and reading
        # them then waits for nothing.
        self._numbers = (numbers / ranks.world_size).to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream().record_event() if loss.is_cuda else None
        self._norm: Any = float("nan")
        self.applied = False  # whether the update was made: all gradients were finite

    def numbers(self) -> tuple[float, float]:
        """The loss of the global batch, and the logits' scale."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, logit_scale = self._numbers.tolist()
        return loss, logit_scale

    def gradient_norm(self) -> float:
        """The norm of all gradients before clipping; NaN for a step that was skipped."""
        return float(self._norm) if self.applied else float("nan")


def train_step(
    engine: Any,
    batch: "LoadedBatch",
    config: Config,
    ranks: Ranks,
    stage: int,
    loss_scale: LossScale,
    meanwhile: Callable[[], None],
) -> StepResult:
    """Make one update from this rank's part of a global batch.

    Its loss and its gradients are those of the global batch, whatever the number of ranks, the
    ZeRO stage and train.micro_batch_size. If any gradient on any rank is not finite, no rank
    changes a parameter. `meanwhile` is called when the whole forward is launched and a GPU still
    computes it: at the end of a backward ZeRO makes the host wait for all that it launched.
    """
    group = dist.group.WORLD if ranks.world_size > 1 else None
    options = {"group": group, "implementation": config.train.loss_implementation}
    keys = to_device(torch.from_numpy(batch.samples.view("int64") ^ batch.index), ranks.device)
    size = config.train.micro_batch_size or len(batch.images)
    *early, last = [slice(i, i + size) for i in range(0, len(batch.images), size)]

    def encode_images(part: slice) -> Any:
        return engine(batch.images[part], None, keys[part])

    def encode_texts(part: slice) -> torch.Tensor:
        return engine(None, batch.captions.part(part))[1]

    # Feature caching: the features of all micro-batches first, one loss over all of them, then the
    # backward micro-batch by micro-batch: exactly the gradients of the large batch. The last one's
    # graph is kept, the others are encoded again.
    with torch.no_grad():
        cached = [encode_texts(part) for part in early]
    texts, cached_texts = join(cached, encode_texts(last))
    # Their way to all ranks runs under the image tower, so does their gradient's way back.
    gathered = texts if group is None else start_gather(texts, group)
    with torch.no_grad():
        cached = [encode_images(part)[0] for part in early]
    live, _, *scalars = encode_images(last)
    images, cached_images = join(cached, live)
    leaves: tuple[Any, Any] = cached_images, cached_texts
    if config.train.loss == "siglip":
        loss = siglip_loss(images, gathered, *scalars, **options)
    else:
        smoothing = config.train.label_smoothing
        loss = clip_loss(images, gathered, *scalars, label_smoothing=smoothing, **options)
    result = StepResult(loss, scalars[0], ranks)
    meanwhile()
    backward(engine, loss, stage, loss_scale)
    for part in early:
        engine.step()
        inputs = batch.images[part], batch.captions.part(part)
        outputs = engine(
            *(x if leaf.grad is not None else None for x, leaf in zip(inputs, leaves)), keys[part]
        )
        # Every parameter takes part in every micro-batch, as ZeRO expects: the scalars with 0.
        surrogate = 0.0 * sum(outputs[2:])
        for features, leaf in zip(outputs, leaves):
            if features is not None:
                surrogate = surrogate + (features.float() * leaf.grad[..., part, :]).sum()
        backward(engine, surrogate / loss_scale.of_a_rank, stage, loss_scale)
    finish_step(engine, stage, loss_scale, result, config.optimizer.clip_norm)
    return result


def join(cached: list[torch.Tensor], live: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Features of all micro-batches, and the cached ones as a leaf that collects their gradient."""
    if not cached:
        return live, None
    leaf = torch.cat(cached, dim=-2).requires_grad_(live.requires_grad)
    return torch.cat([leaf, live], dim=-2), leaf


def backward(engine: Any, loss: torch.Tensor, stage: int, loss_scale: LossScale) -> None:
    """The backward of one micro-batch; its gradients come out multiplied by the loss scale."""
    if loss_scale.active and stage > 0:
        # ZeRO multiplies the loss, and divides the gradients before it clips and updates.
        engine.optimizer.override_loss_scale(loss_scale.of_a_rank)
    elif loss_scale.active:
        loss = loss * loss_scale.of_a_rank
    engine.backward(loss, scale_wrt_gas=False)


def finish_step(
    engine: Any, stage: int, loss_scale: LossScale, result: StepResult, clip_norm: float
) -> None:
    """Step after the last micro-batch, unless a gradient is not finite.

    ZeRO looks for such gradients itself, and clips. Plain data parallelism (stage 0) does not, and
    keeps no norm: it is taken from the averaged gradients, which are the same on every rank.
    """
    if stage > 0:
        engine.step()
        result.applied = engine.was_step_applied()
        result._norm = engine.get_global_grad_norm()
        loss_scale.update(result.applied)
        return
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if loss_scale.active:
        for gradient in gradients:
            gradient.div_(loss_scale.of_a_rank)
    norm = torch.nn.utils.get_total_norm(gradients)
    result._norm = norm.item()  # the host's one wait: read later, it would wait for the update
    result.applied = math.isfinite(result._norm)
    if not result.applied:
        for parameter in engine.module.parameters():
            parameter.grad = None  # the optimizer passes over parameters without a gradient
    elif clip_norm:
        torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), clip_norm, norm)
    engine.step()
    loss_scale.update(result.applied)
