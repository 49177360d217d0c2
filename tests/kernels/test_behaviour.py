"""What the losses promise beyond their values."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from laclip.kernels import clip_loss, reference, siglip_loss
from laclip.kernels.testing import PUBLIC, gradients, inputs

BF16 = torch.bfloat16
both_losses = pytest.mark.parametrize("loss", ["clip", "siglip"])
every_fused = pytest.mark.parametrize("implementation", ["triton", "chunked"])


@both_losses
@every_fused
def test_two_runs_are_equal_bit_for_bit(loss, implementation, device):
    tensors = inputs(loss, "planted", 270, 64, BF16, device, 50.0)
    first, second = (
        gradients(PUBLIC[loss], tensors, implementation=implementation, chunk_rows=128)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@both_losses
@every_fused
def test_no_output_is_left_unwritten(loss, implementation, device):
    tensors = inputs(loss, "planted", 140, 72, BF16, device, 50.0, variants=2)
    options = {"implementation": implementation, "chunk_rows": 100}
    clean = gradients(PUBLIC[loss], tensors, **options)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert torch.empty(1, device=device).isnan()
        poisoned = gradients(PUBLIC[loss], tensors, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned))


@both_losses
@every_fused
def test_chunk_rows_changes_the_gradients_by_rounding_alone(loss, implementation, device):
    tensors = inputs(loss, "planted", 130, 64, torch.float32, device, 50.0)
    whole, parts = (
        gradients(PUBLIC[loss], tensors, implementation=implementation, chunk_rows=rows)
        for rows in (4096, 33)
    )
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@both_losses
@every_fused
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_what_is_not_finite_gives_nan(loss, implementation, bad, where, device):
    tensors = inputs(loss, "random", 70, 64, BF16, device, 20.0)
    tensors[where] = tensors[where].clone()
    tensors[where].view(-1)[tensors[where].numel() // 2] = bad
    assert PUBLIC[loss](*tensors, implementation=implementation).isnan()


@every_fused
def test_unused_gradients_cost_nothing(implementation, device, monkeypatch):
    module = sys.modules["laclip.kernels.clip_loss"]
    made = []
    product = module.product
    monkeypatch.setattr(module, "product", lambda *a, **k: (made.append(1), product(*a, **k)))
    tensors = inputs("clip", "random", 64, 64, BF16, device, 20.0)

    def products_for(*wanted):
        made.clear()
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        loss = clip_loss(*leaves, implementation=implementation)
        if wanted:
            loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(3)]
        return len(made)

    wanted = ((0, 1, 2), (0,), (1,), (2,), ())
    assert [products_for(*which) for which in wanted] == [2, 1, 1, 0, 0]


@every_fused
def test_validation_without_gradients_equals_the_training_loss(implementation, device):
    tensors = inputs("siglip", "planted", 65, 64, BF16, device, 20.0)
    training = gradients(siglip_loss, tensors, implementation=implementation)[0]
    with torch.no_grad():
        value = siglip_loss(*tensors, implementation=implementation)
    torch.testing.assert_close(value, training, rtol=1e-6, atol=0)


@both_losses
@every_fused
@pytest.mark.parametrize("batch", [1, 65])
def test_features_need_not_be_contiguous_or_aligned(loss, implementation, batch, device):
    # torch calls a single row contiguous whatever its stride.
    image, text, *scalars = inputs(loss, "random", batch, 64, BF16, device, 20.0)
    expected = gradients(PUBLIC[loss], [image, text, *scalars], implementation=implementation)
    wide = torch.zeros(batch, 67, dtype=BF16, device=device)
    wide[:, :64] = image
    flat = torch.zeros(batch * 64 + 1, dtype=BF16, device=device)
    flat[1:] = text.reshape(-1)
    leaves = [wide.requires_grad_(), flat.requires_grad_()]
    strided = [leaves[0][:, :64], leaves[1][1:].view(batch, 64)]
    found = PUBLIC[loss](*strided, *scalars, implementation=implementation)
    found.backward()
    assert torch.equal(found, expected[0])
    assert torch.equal(leaves[0].grad[:, :64], expected[1])
    assert torch.equal(leaves[1].grad[1:].view(batch, 64), expected[2])


def use_tf32():
    torch.set_float32_matmul_precision("high")


def use_bf16():
    torch.set_float32_matmul_precision("medium")


def use_tf32_by_backend():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def use_fp16_sums():
    torch.backends.cuda.matmul.allow_fp16_accumulation = True


def matmul_settings():
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return cuda.fp32_precision, cpu.fp32_precision, cuda.allow_fp16_accumulation


@both_losses
@every_fused
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("use", [use_tf32, use_bf16, use_tf32_by_backend, use_fp16_sums])
def test_autocast_and_precision_settings_change_nothing(loss, implementation, use, dtype, device):
    tensors = inputs(loss, "random", 65, 64, dtype, device, 20.0)
    expected = gradients(PUBLIC[loss], tensors, implementation=implementation)
    use()
    before = matmul_settings()
    try:
        with torch.autocast(device, torch.bfloat16):
            found = gradients(PUBLIC[loss], tensors, implementation=implementation)
        assert matmul_settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@both_losses
@every_fused
def test_compiled_code_may_call_the_losses(loss, implementation, device):
    tensors = inputs(loss, "planted", 20, 16, torch.float32, device, 20.0)

    def step(image, text, *scalars):
        return PUBLIC[loss](2.0 * image / 2.0, text, *scalars, implementation=implementation)

    expected, found = gradients(step, tensors), gradients(torch.compile(step), tensors)
    for a, b in zip(expected, found):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@every_fused
def test_features_changed_before_the_backward_are_noticed(implementation, device):
    image, text, scale = inputs("clip", "random", 16, 16, BF16, device, 20.0)
    loss = clip_loss(image, text.requires_grad_(), scale, implementation=implementation)
    image += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_one_variant_equals_no_variants(device):
    image, text, scale = inputs("clip", "planted", 65, 64, BF16, device, 20.0)
    flat = gradients(clip_loss, [image, text, scale], implementation="triton")
    one = gradients(clip_loss, [image, text[None], scale], implementation="triton")
    assert torch.equal(flat[0], one[0])
    assert torch.equal(flat[2], one[2][0])


@both_losses
def test_the_incoming_gradient_scales_every_gradient(loss, device):
    tensors = inputs(loss, "planted", 65, 64, torch.float32, device, 20.0)
    once = gradients(PUBLIC[loss], tensors, implementation="triton")
    thrice = gradients(lambda *t: 3 * PUBLIC[loss](*t, implementation="triton"), tensors)
    for a, b in zip(once[1:], thrice[1:]):
        torch.testing.assert_close(3 * a, b, rtol=1e-6, atol=0)


def test_the_flag_is_down_for_usual_features_and_up_where_sums_are_lost(device):
    from laclip.kernels import triton_blocks

    for kind, expected in (("random", 0), ("planted", 0), ("opposite", 1)):
        image, text, scale = inputs("clip", kind, 257, 64, BF16, device, 100.0)
        pairs = triton_blocks.pair_cosines(image, text)
        assert triton_blocks.log_sums(image, text, scale, pairs, 0, 4096)[2].item() == expected


def test_reference_is_cross_entropy_of_the_matrix():
    image, text, scale = (t.double() for t in inputs("clip", "random", 9, 8, BF16, "cpu", 5.0))
    logits = scale * image @ text.T
    target = torch.arange(9)
    for smoothing in (0.0, 0.3):
        rows, columns = (
            F.cross_entropy(m, target, label_smoothing=smoothing) for m in (logits, logits.T)
        )
        found = reference.clip_loss(image, text, scale, label_smoothing=smoothing)
        torch.testing.assert_close(found, (rows + columns) / 2)


@both_losses
@pytest.mark.parametrize("variants", [0, 2])
def test_reference_passes_gradcheck(loss, variants):
    tensors = inputs(loss, "random", 5, 8, BF16, "cpu", 3.0, variants)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(PUBLIC[loss], leaves)
