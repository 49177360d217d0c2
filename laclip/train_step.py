"""One update of the model, or none where the numbers are not sound; the same on every rank.

The engine is DeepSpeed's; it is used through its forward, backward and step.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from laclip.config import Config
from laclip.kernels import clip_loss, siglip_loss, start_gather
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
) -> StepResult:
    """Make one update from this rank's part of a global batch.

    Its loss and its gradients are those of the global batch, whatever the number of ranks, the
    ZeRO stage and train.micro_batch_size. If any gradient on any rank is not finite, no rank
    changes a parameter.
    """
    group = dist.group.WORLD if ranks.world_size > 1 else None
    options = {"group": group, "implementation": config.train.loss_implementation}
    captions = batch.captions
    keys = torch.from_numpy(batch.samples.view("int64") ^ batch.index)
    keys = keys.to(ranks.device, non_blocking=True)
    size = config.train.micro_batch_size or len(batch.images)
    parts = [slice(i, i + size) for i in range(0, len(batch.images), size)]

    def loss_of(images: torch.Tensor, texts: Any, *scalars: torch.Tensor) -> torch.Tensor:
        if config.train.loss == "siglip":
            return siglip_loss(images, texts, *scalars, **options)
        return clip_loss(
            images, texts, *scalars, label_smoothing=config.train.label_smoothing, **options
        )

    def gather(texts: torch.Tensor) -> Any:
        """Their way to all ranks runs under the image tower, so does their gradient's way back."""
        return texts if group is None else start_gather(texts, group)

    if len(parts) == 1:
        texts = gather(engine(None, captions)[1])
        images, _, *scalars = engine(batch.images, None, keys)
        loss = loss_of(images, texts, *scalars)
        result = StepResult(loss, scalars[0], ranks)
        backward(engine, loss, stage, loss_scale)
        finish_step(engine, stage, loss_scale, result)
        return result
    # Feature caching: the features of all micro-batches first, one loss over all of them, then the
    # backward micro-batch by micro-batch: exactly the gradients of the large batch.
    with torch.no_grad():
        texts = torch.cat([engine(None, captions.part(part))[1] for part in parts], dim=-2)
    texts.requires_grad_()
    gathered = gather(texts)
    with torch.no_grad():
        cached = [engine(batch.images[part], None, keys[part]) for part in parts]
    images = torch.cat([outputs[0] for outputs in cached]).requires_grad_()
    scalars = [scalar.detach().requires_grad_() for scalar in cached[0][2:]]
    loss = loss_of(images, gathered, *scalars)
    result = StepResult(loss, scalars[0], ranks)
    (loss * loss_scale.value).backward()
    leaves: list[Any] = [images, texts, *scalars]
    image_gradient, text_gradient, *scalar_gradients = [leaf.grad for leaf in leaves]
    for part in parts:
        part_images, part_texts, *scalars = engine(
            batch.images[part], captions.part(part), keys[part]
        )
        surrogate = (part_images.float() * image_gradient[part]).sum()
        surrogate = surrogate + (part_texts.float() * text_gradient[..., part, :]).sum()
        for scalar, gradient in zip(scalars, scalar_gradients):
            surrogate = surrogate + scalar * gradient / len(parts)
        backward(engine, surrogate / loss_scale.value, stage, loss_scale)
        finish_step(engine, stage, loss_scale, result)
    return result


def backward(engine: Any, loss: torch.Tensor, stage: int, loss_scale: LossScale) -> None:
    """The backward of one micro-batch; its gradients come out multiplied by the loss scale."""
    if loss_scale.active and stage > 0:
        # ZeRO multiplies the loss, and divides the gradients before it clips and updates.
        engine.optimizer.override_loss_scale(loss_scale.value)
    elif loss_scale.active:
        loss = loss * loss_scale.value
    engine.backward(loss, scale_wrt_gas=False)


def finish_step(engine: Any, stage: int, loss_scale: LossScale, result: StepResult) -> None:
    """Step, which updates at the last micro-batch alone, unless a gradient is not finite.

    ZeRO looks for such gradients itself. Plain data parallelism (stage 0) does not, and keeps no
    norm: it is taken from the averaged gradients, which are the same on every rank.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return
    if stage > 0:
        engine.step()
        result.applied = engine.was_step_applied()
        result._norm = engine.get_global_grad_norm()
        loss_scale.update(result.applied)
        return
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if loss_scale.active:
        for gradient in gradients:
            gradient.div_(loss_scale.value)
    result._norm = torch.nn.utils.get_total_norm(gradients)
    result.applied = bool(result._norm.isfinite())
    if not result.applied:
        for parameter in engine.module.parameters():
            parameter.grad = None  # the optimizer passes over parameters without a gradient
    engine.step()
    loss_scale.update(result.applied)
