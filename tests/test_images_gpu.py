"""Decoding and augmentation on a GPU: DALI's mixed decoder, its streams beside PyTorch's."""

import numpy as np
import pytest
import torch
from test_images import CPU, levels, photograph

from laclip.images import DecodeError, ImagePipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BATCH = 8


def pipeline_on(device, train=True, **more):
    return ImagePipeline(batch_size=BATCH, image_size=96, train=train, device=device, **more)


def draw_batches(count):
    """Encoded images, windows and mirrors of each batch."""
    rng = np.random.default_rng(0)
    photographs = [photograph(320 + 8 * i, 240 + 16 * i, i)[0] for i in range(16)]
    for _ in range(count):
        encoded = [photographs[i] for i in rng.integers(0, 16, BATCH)]
        windows = [(*rng.integers(0, 100, 2), *rng.integers(60, 130, 2)) for _ in range(BATCH)]
        yield encoded, np.array(windows, np.int32), rng.integers(0, 2, BATCH).astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
def test_images_are_those_of_the_cpu(train, dtype):
    for encoded, windows, mirrors in draw_batches(2):
        found = []
        for device in (torch.device("cuda", 0), CPU):
            pipeline = pipeline_on(device, train, dtype=dtype)
            pipeline.feed(encoded, *((windows, mirrors) if train else ()))
            found.append(levels(pipeline.take().cpu().float()))
        # Another upsampling of the colours, another resize: near, not equal.
        assert (found[0] - found[1]).abs().mean() < 3


def test_batches_are_whole_while_the_gpu_is_busy_elsewhere():
    batches, device = list(draw_batches(24)), torch.device("cuda", 0)
    taken = []
    for busy in (False, True):
        pipeline = pipeline_on(device, depth=4)
        images = []
        for i in range(len(batches) + 4):
            if i < len(batches):
                pipeline.feed(*batches[i])
            if i >= 4:
                if busy:
                    torch.cuda._sleep(50_000_000)  # cycles: the copies of many batches wait
                images.append(pipeline.take())
                if not busy:
                    torch.cuda.synchronize()
        taken.append(torch.stack(images))
    # Which decoder took an image may differ, and with it some pixels by a level.
    assert (taken[0] - taken[1]).abs().mean(dim=(2, 3, 4)).max() < 0.02


def test_an_undecodable_image_is_named_and_the_pipeline_goes_on():
    (encoded, windows, mirrors), *_ = draw_batches(1)
    pipeline = pipeline_on(torch.device("cuda", 0))
    broken = list(encoded)
    broken[3] = np.zeros(1000, np.uint8)
    pipeline.feed(broken, windows, mirrors)
    with pytest.raises(DecodeError) as failure:
        pipeline.take()
    assert list(failure.value.reasons) == [3]
    pipeline.replace({3: encoded[3]}, windows, mirrors)
    mended = pipeline.take()
    pipeline.feed(encoded, windows, mirrors)
    torch.testing.assert_close(pipeline.take(), mended, atol=0.1, rtol=0)
