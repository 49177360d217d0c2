"""Loss and every gradient against float64, beside plain PyTorch in the same dtype."""

import pytest
import torch

from laclip.kernels.testing import FLOORS, assert_as_exact_as_plain, fused, inputs, plain, truth

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    (1, 8),
    (2, 16),
    (63, 1280),
    (64, 64),
    (65, 200),
    (127, 512),
    (257, 136),
    (1000, 8),
]
NAMES = ["loss", "image", "text", "logit_scale", "logit_bias"]


def check(loss, tensors, implementation, magnitude=0.0, chunk_rows=4096, **smoothing):
    dtype, batch = tensors[0].dtype, len(tensors[0])
    found = fused(loss, tensors, implementation, chunk_rows=chunk_rows, **smoothing)
    by_hand, exact = plain(loss, tensors, **smoothing), truth(loss, tensors, **smoothing)
    for name, *results in zip(NAMES, found, by_hand, exact):
        if name == "loss":
            floor, size = 5e-6, max(magnitude, 1e-6)
        elif name in ("image", "text"):
            # Rows of gradient have at most the length logit_scale / batch.
            floor, size = FLOORS[dtype], magnitude * float(tensors[2]) / batch**0.5
        else:
            # A difference of sums of up to 1, of which fp32 exponents near 100 leave 1e-6.
            floor, size = 1e-4, max(magnitude, 1e-2)
        assert_as_exact_as_plain(*results, floor, name, size)


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize(("batch", "dim"), SHAPES)
def test_error_is_at_most_twice_plain_pytorchs(loss, batch, dim, implementation, device):
    tensors = inputs(loss, "random", batch, dim, BF16, device, 20.0)
    check(loss, tensors, implementation, chunk_rows=700)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize(("batch", "dim"), [(2, 8), (65, 200), (257, 64)])
def test_fp16_and_fp32_are_as_exact(loss, batch, dim, dtype, device):
    check(loss, inputs(loss, "planted", batch, dim, dtype, device, 20.0), "triton")


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["planted", "gap", "opposite", "equal", "repeated"])
def test_scale_100_is_exact_for_hard_features(loss, kind, dtype, implementation, device):
    # "opposite" underflows under the shared shift: the flag and the running maximum serve it.
    tensors = inputs(loss, kind, 257, 64, dtype, device, 100.0)
    check(loss, tensors, implementation, magnitude=1.0 if kind in ("equal", "repeated") else 0.0)


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("variants", [0, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_variants_and_label_smoothing_are_exact(variants, smoothing, implementation, device):
    tensors = inputs("clip", "planted", 130, 64, BF16, device, 30.0, variants)
    check("clip", tensors, implementation, chunk_rows=70, label_smoothing=smoothing)


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
def test_sigmoid_loss_takes_variants(implementation, device):
    tensors = inputs("siglip", "planted", 65, 64, BF16, device, 30.0, 3)
    check("siglip", tensors, implementation, chunk_rows=40)


def test_late_in_training_the_error_is_a_fiftieth_of_plain_bf16s(device):
    tensors = inputs("clip", "planted", 300, 64, BF16, device, 100.0)
    rows = zip(fused("clip", tensors, "triton"), plain("clip", tensors), truth("clip", tensors))
    for mine, by_hand, exact in list(rows)[1:]:
        assert 50 * (mine.double() - exact).norm() <= (by_hand.double() - exact).norm()


@pytest.mark.parametrize("stretch", [5.0, 30.0])
def test_features_that_are_not_unit_length_are_served_by_the_running_maximum(stretch, device):
    image, text, scale = inputs("clip", "random", 200, 64, BF16, device, 100.0)
    check("clip", [image * stretch, text, scale], "triton")
