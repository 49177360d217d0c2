"""User errors are named before any work is done."""

import pytest
import torch

from laclip.kernels import clip_loss, siglip_loss, start_gather

IMAGE = torch.ones(4, 16)
SCALE = torch.tensor(10.0)
BIAS = torch.tensor(-10.0)


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        (IMAGE[0], IMAGE, r"image_features: found shape \[16\], expected \[batch, dim\]"),
        (IMAGE, IMAGE[0], r"text_features: found shape \[16\]"),
        (IMAGE, IMAGE[:3], r"\[4, 16\] and text_features \[3, 16\] disagree"),
        (IMAGE, IMAGE[:, :8], "disagree"),
        (IMAGE, IMAGE.half(), "float32, text_features is torch.float16"),
        (IMAGE.long(), IMAGE.long(), "image_features: found torch.int64"),
        (IMAGE[:0], IMAGE[:0], "empty batch"),
        (IMAGE, torch.ones(0, 4, 16), "empty batch"),
        (IMAGE[:, :12], IMAGE[:, :12], "dim: found 12, expected a multiple of 8"),
        (IMAGE, IMAGE.to("meta"), "image_features is on cpu, text_features is on meta"),
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "reference", "chunked", "triton"])
def test_features_that_do_not_fit_are_refused(image, text, message, implementation):
    with pytest.raises(ValueError, match=message):
        clip_loss(image, text, SCALE, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        siglip_loss(image, text, SCALE, BIAS, implementation=implementation)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (10.0, "logit_scale: found float"),
        (torch.tensor([10.0]), r"logit_scale: found torch.float32 of shape \[1\], expected a 0-d"),
        (torch.tensor(10.0, dtype=torch.bfloat16), "found torch.bfloat16"),
        (torch.tensor(10.0, device="meta"), "logit_scale is on meta"),
    ],
)
def test_a_scale_that_is_no_0d_fp32_tensor_is_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(IMAGE, IMAGE, scale)
    with pytest.raises(ValueError, match=message.replace("scale", "bias")):
        siglip_loss(IMAGE, IMAGE, SCALE, scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing: found 1.5"),
        ({"chunk_rows": 0}, "chunk_rows: found 0"),
        ({"chunk_rows": 1.5}, "chunk_rows: found 1.5"),
        ({"implementation": "cuda"}, "found 'cuda', expected one of auto, triton"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clip_loss(IMAGE, IMAGE, SCALE, **options)


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
def test_float64_is_for_the_reference_alone(implementation):
    with pytest.raises(ValueError, match="use implementation='reference'"):
        clip_loss(IMAGE.double(), IMAGE.double(), SCALE.double(), implementation=implementation)
    assert clip_loss(IMAGE.double(), IMAGE.double(), SCALE.double()).dtype == torch.float64


def test_start_gather_needs_a_group():
    with pytest.raises(ValueError, match="needs a process group"):
        start_gather(IMAGE, None)
