"""For tests of the kernels: the interpreter mended, features to try, errors to bound.

Importing this mends triton's interpreter (3.6 to 3.9 multiply the raw bits of bf16 in tl.dot, cut
where a cast should round, and make integers in a way that NumPy 2.4 refuses), so set
TRITON_INTERPRET=1, import this, and only then run kernels. On a GPU it changes nothing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from laclip.kernels import clip_loss, reference, siglip_loss
from laclip.kernels.clip_loss import Problem, backward_products, block_source, forward_sums
from laclip.kernels.products import full_precision
from laclip.kernels.siglip_loss import one_pass

Tensors = list[torch.Tensor]
FLOORS = {torch.bfloat16: 3e-4, torch.float16: 3e-4, torch.float32: 2e-5}
PUBLIC = {"clip": clip_loss, "siglip": siglip_loss}


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _mend_interpreter() -> None:
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    broken_dot, broken_cast = builder.create_dot, builder.cast_impl
    broken_patch = interpreter._patch_lang_tensor

    def widened(operand):
        if operand.dtype != tl.bfloat16:
            return operand
        return handle(_widen(operand.data), tl.float32)

    def create_dot(self, a, b, *rest, **named):
        return broken_dot(self, widened(a), widened(b), *rest, **named)

    def cast_impl(self, source, target):
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return handle(_round(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return handle(_widen(source.data), tl.float32)
        return broken_cast(self, source, target)

    def patch_tensor(tensor, scope):
        broken_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_tensor


if triton.knobs.runtime.interpret:
    _mend_interpreter()


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error, in float64; NaN where either holds one."""
    truth = truth.double()
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def assert_as_exact_as_plain(
    found: torch.Tensor,
    plain: torch.Tensor,
    truth: torch.Tensor,
    floor: float,
    name: str,
    magnitude: float = 0.0,
) -> None:
    """Fail unless the error against float64 is at most twice plain PyTorch's plus a floor.

    In Frobenius norms; the floor is a share of the truth's norm, or of `magnitude` where the truth
    is zero and what is left of large terms that cancel is all there is to see.
    """
    truth = truth.double()
    assert found.shape == truth.shape, f"{name}: {list(found.shape)} for {list(truth.shape)}"
    error, plain_error = (float((x.double() - truth).norm()) for x in (found, plain))
    norm = float(truth.norm())
    allowed = 2 * plain_error + floor * max(norm, magnitude)
    assert error <= allowed, (
        f"{name}: error {error:.2e} (of {norm:.2e}), allowed {allowed:.2e}, plain {plain_error:.2e}"
    )


def features(
    kind: str, batch: int, dim: int, dtype: torch.dtype, device: str = "cpu", variants: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length image and text features of a kind that is hard in its own way.

    "random"; "planted": pairs close, as late in training; "gap": all cosines of different pairs and
    of pairs near -0.6 (a modality gap); "opposite": all near -1; "equal": all rows equal;
    "repeated": one row stands twice.
    """
    generator = torch.Generator().manual_seed(batch * 1315423911 + dim)

    def unit(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=-1)

    image = unit(batch, dim)
    text = unit(*([variants] if variants else []), batch, dim)
    if kind == "planted":
        text = 0.5 * image + 0.85 * text
    elif kind in ("gap", "opposite"):
        away = unit(dim)
        share = 0.6**0.5 if kind == "gap" else 0.999
        rest = (1 - share**2) ** 0.5
        image = share * away + rest * F.normalize(image - (image @ away)[..., None] * away, dim=-1)
        text = -share * away + rest * F.normalize(text - (text @ away)[..., None] * away, dim=-1)
    elif kind == "equal":
        image, text = image[:1].expand(batch, dim), image[:1].expand_as(text)
    elif kind == "repeated":
        text = 0.5 * image + 0.85 * text
        image[-1], text[..., -1, :] = image[0], text[..., 0, :]
    else:
        assert kind == "random", kind
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return image.to(dtype).to(device), text.to(dtype).to(device)


def plain_clip_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """What a trainer writes by hand: logits in the features' dtype, cross-entropy in fp32."""
    target = torch.arange(len(image), device=image.device)
    total = torch.zeros((), device=image.device)
    for variant in text if text.dim() == 3 else text[None]:
        by_image = logit_scale.to(image.dtype) * image @ variant.T
        by_text = logit_scale.to(image.dtype) * variant @ image.T
        for logits in (by_image, by_text):
            total = total + F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
    return total / (2 * (len(text) if text.dim() == 3 else 1))


def plain_siglip_loss(
    image: torch.Tensor, text: torch.Tensor, logit_scale: torch.Tensor, logit_bias: torch.Tensor
) -> torch.Tensor:
    """The same for the sigmoid loss."""
    labels = 2 * torch.eye(len(image), device=image.device) - 1
    total = torch.zeros((), device=image.device)
    for variant in text if text.dim() == 3 else text[None]:
        logits = logit_scale.to(image.dtype) * image @ variant.T + logit_bias.to(image.dtype)
        total = total - F.logsigmoid(labels * logits.float()).sum() / len(image)
    return total / (len(text) if text.dim() == 3 else 1)


def inputs(
    loss: str,
    kind: str,
    batch: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    scale: float,
    variants: int = 0,
) -> Tensors:
    """image, text, logit_scale and, for the sigmoid loss, logit_bias."""
    image, text = features(kind, batch, dim, dtype, device, variants)
    scalars = [scale] if loss == "clip" else [scale, -scale / 3]
    return [image, text, *(torch.tensor(value, device=device) for value in scalars)]


def gradients(function: Callable[..., torch.Tensor], tensors: Tensors, **options: Any) -> Tensors:
    """The loss, and its gradients in all tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def truth(loss: str, tensors: Tensors, **options: Any) -> Tensors:
    """The reference in float64."""
    return gradients(getattr(reference, f"{loss}_loss"), [t.double() for t in tensors], **options)


def plain(loss: str, tensors: Tensors, **options: Any) -> Tensors:
    """What a trainer writes by hand, in the features' dtype."""
    function = plain_clip_loss if loss == "clip" else plain_siglip_loss
    return gradients(function, tensors, **options)


def fused(
    loss: str,
    tensors: Tensors,
    implementation: str,
    label_smoothing: float = 0.0,
    chunk_rows: int = 4096,
) -> Tensors:
    """The loss, and its gradients in fp32, before they are rounded to the features' dtype."""
    image, text, *scalars = tensors
    blocks = block_source(implementation, image)
    variants = text if text.dim() == 3 else text[None]
    problem = Problem(image, variants, scalars[0], None, label_smoothing, chunk_rows, blocks)
    with full_precision(image):
        if loss == "siglip":
            value, found, _ = one_pass(problem, scalars[1], (True, True, True, True))
        else:
            value, sums = forward_sums(problem)
            one = torch.ones((), device=image.device)
            found = backward_products(problem, sums, one, (True, True, True), torch.float32)
    return [value, found[0], found[1].view(text.shape), *found[2:]]
