"""The towers: exactness of packing, keyed patch dropout, precision, and errors."""

import math

import pytest
import torch

from laclip.config import ModelConfig, TextConfig, VisionConfig
from laclip.model import (
    build_model,
)

VOCABULARY, EOT, CONTEXT = 100, 99, 77


def configure(vision=None, text=None, **options):
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "depth": 2, "heads": 3} | (
        vision or {}
    )
    text = {"width": 32, "depth": 2, "heads": 2} | (text or {})
    return ModelConfig(
        embed_dim=24, vision=VisionConfig(**vision), text=TextConfig(**text), **options
    )


def build(siglip=False, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(configure(**options), VOCABULARY, EOT, siglip=siglip)


def captions(lengths, seed=1):
    """Token ids [captions, 77]: `length` tokens each, the end-of-text token the last of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), CONTEXT, dtype=torch.int32)
    for row, length in enumerate(lengths):
        ids[row, : length - 1] = torch.randint(1, EOT, (length - 1,), generator=generator).int()
        ids[row, length - 1] = EOT
    return ids


def images(batch, seed=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


LENGTHS = [[1, 77, 2, 8, 9, 16, 17, 40], [20] * 5, [1], [77, 77], list(range(2, 78))]


def plain_text(tower, token_ids):
    """The text tower as it is written in the paper: every token, a mask, plain PyTorch."""
    x = tower.token_embedding(token_ids) + tower.positional_embedding
    mask = torch.full((CONTEXT, CONTEXT), -math.inf).triu(1)
    for block in tower.blocks:
        heads = block.heads
        q, k, v = (
            t.unflatten(2, (heads, -1)).transpose(1, 2)
            for t in block.qkv(block.norm1(x)).chunk(3, dim=2)
        )
        weights = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + mask).softmax(dim=3)
        x = x + block.attention_out((weights @ v).transpose(1, 2).flatten(2))
        hidden = block.mlp_in(block.norm2(x))
        gelu = torch.nn.functional.gelu
        act = hidden * torch.sigmoid(1.702 * hidden) if block.quick_gelu else gelu(hidden)
        x = x + block.mlp_out(act)
    first_end = torch.tensor([row.tolist().index(EOT) for row in token_ids])
    pooled = tower.norm(x)[torch.arange(len(x)), first_end] @ tower.projection.weight.T
    return pooled / pooled.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} captions")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_packed_captions_give_the_padded_features_and_gradients(lengths, activation):
    model = build(text={"activation": activation}).double()
    ids = captions(lengths)
    weight = torch.randn(len(lengths), 24, dtype=torch.float64)
    padded = plain_text(model.text, ids.long())
    (padded * weight).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    packed = model.encode_text(ids)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-13)
    (packed * weight).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name] - expected[name]).norm()
        assert error <= 1e-12 * expected[name].norm() + 1e-13, name
