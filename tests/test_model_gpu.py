"""The model on a GPU against the same model on the CPU, and the attention packages."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from laclip.config import ModelConfig, TextConfig, VisionConfig
from laclip.model import build_model, compile_blocks, kept_patches

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
EOT = 99


def build(attention="sdpa"):
    torch.manual_seed(0)
    vision = VisionConfig(image_size=64, patch_size=8, width=128, depth=3, heads=2, qk_norm=True)
    text = TextConfig(width=128, depth=3, heads=2)
    config = ModelConfig(embed_dim=64, attention=attention, vision=vision, text=text)
    return build_model(config, 100, EOT)


def draw_batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 3, 64, 64, generator=generator)
    token_ids = torch.zeros(16, 77, dtype=torch.int32)
    for row in range(16):
        length = 2 + 5 * row
        token_ids[row, : length - 1] = torch.randint(1, EOT, (length - 1,), generator=generator)
        token_ids[row, length - 1] = EOT
    return images, token_ids


def run(model, device, dtype=None):
    """Features and gradients of one step, on the CPU in fp32."""
    images, token_ids = draw_batch()
    model.to(device)
    with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
        image_features, text_features, scale = model(images.to(device), token_ids.to(device))
    logits = scale * image_features.float() @ text_features.float().T
    F.cross_entropy(logits, torch.arange(16, device=device)).backward()
    features = torch.cat([image_features, text_features]).detach().float().cpu()
    return features, {n: p.grad.float().cpu() for n, p in model.named_parameters()}


def errors(found, expected):
    """Relative Frobenius errors of the features and of the worst parameter's gradient."""
    floor = 1e-2 * torch.stack([g.norm() for g in expected[1].values()]).norm()
    gradients = [
        (found[1][name] - g).norm() / g.norm().clamp(min=floor) for name, g in expected[1].items()
    ]
    return float((found[0] - expected[0]).norm() / expected[0].norm()), float(max(gradients))


@pytest.fixture(scope="module")
def truth():
    return run(build(), "cpu")


def test_fp32_on_the_gpu_equals_the_cpu(truth):
    features, gradients = errors(run(build(), DEVICE), truth)
    assert features <= 1e-5
    assert gradients <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_on_the_gpu_is_near_fp32(truth, dtype, compiled):
    model = build()
    if compiled:
        compile_blocks(model)
    features, gradients = errors(run(model, DEVICE, dtype), truth)
    assert features <= 2e-2
    assert gradients <= 1e-1


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_attention_package_equals_sdpa_where_it_is_installed(truth, backend):
    if importlib.util.find_spec(backend) is None:
        with pytest.raises(ValueError, match=r"is not installed\. Run: pip install"):
            build(backend)
        return
    ours = errors(run(build(backend), DEVICE, torch.bfloat16), truth)
    sdpa = errors(run(build(), DEVICE, torch.bfloat16), truth)
    assert ours[0] <= 2 * sdpa[0] + 1e-3
    assert ours[1] <= 2 * sdpa[1] + 1e-3


def test_captions_that_stay_on_the_cpu_give_the_same_features():
    model = build().to(DEVICE).eval()
    token_ids = draw_batch()[1]
    assert torch.equal(model.encode_text(token_ids), model.encode_text(token_ids.to(DEVICE)))


def test_the_gpu_keeps_the_same_patches():
    keys = torch.arange(-500, 500) * 2**53 + 17
    assert torch.equal(kept_patches(keys.to(DEVICE), 196, 0.5).cpu(), kept_patches(keys, 196, 0.5))
