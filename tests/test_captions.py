"""Captions end to end: from the reader, in parts, in groups, and through the text tower."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from laclip.attention import group_captions
from laclip.captions import pack
from laclip.config import DataConfig, ModelConfig, TextConfig, VisionConfig
from laclip.dataset import open_dataset
from laclip.loader import Loader
from laclip.model import build_model
from laclip.prepare.tokenize import tokenize
from laclip.tokenizer import load_tokenizer

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
EOT, CONTEXT = 99, 77


def draw_captions(lengths):
    """Token ids [captions, 77], padded: `length` tokens each, the last of them end of text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, EOT, (len(lengths), CONTEXT), generator=generator, dtype=torch.int32)
    for row, length in zip(ids, lengths):
        row[length - 1], row[length:] = EOT, 0
    return ids


@pytest.mark.parametrize("shape", [(9,), (3, 9)])
@pytest.mark.parametrize("samples", [slice(0, 9), slice(2, 5), slice(8, 9), slice(6, 12)])
def test_a_part_holds_the_captions_of_its_samples_whole(shape, samples):
    lengths = torch.randint(1, CONTEXT + 1, shape, generator=torch.Generator().manual_seed(0))
    padded = draw_captions(lengths.flatten().tolist()).unflatten(0, shape)
    whole = pack(padded, EOT)
    assert whole.shape == shape and whole.lengths.tolist() == lengths.flatten().tolist()
    assert whole.token_ids.dtype == whole.cu_seqlens.dtype == torch.int32
    found, expected = whole.part(samples), pack(padded[..., samples, :], EOT)
    assert found.shape == expected.shape
    for a, b in zip(found[:2], expected[:2]):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_every_caption_once_whole_and_with_little_padding(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(200, generator=generator) * 8 + 20).clamp(2, 77).long()
    padded = draw_captions(lengths.tolist())
    token_ids, places, pooled, layout = group_captions(pack(padded, EOT), CONTEXT)
    assert len(token_ids) == sum(count * tokens for count, tokens in layout.groups)
    assert sum(count for count, _ in layout.groups) == 200
    for caption, row in enumerate(pooled.tolist()):  # a caption's tokens stand in order before it
        length = int(lengths[caption])
        assert torch.equal(token_ids[row - length + 1 : row + 1], padded[caption, :length])
    starts = [torch.arange(tokens).repeat(count) for count, tokens in layout.groups]
    assert torch.equal(places, torch.cat(starts))  # and each row is a whole sequence of its group
    assert torch.equal(places[pooled], lengths - 1)
    assert len(token_ids) < 1.35 * int(lengths.sum())


def test_a_few_numbers_of_rows_serve_all_batches():
    generator = torch.Generator().manual_seed(0)
    rows, tokens = [], 0
    for _ in range(100):
        lengths = (torch.randn(1024, generator=generator) * 8 + 20).clamp(4, 77).long()
        groups = group_captions(pack(draw_captions(lengths.tolist()), EOT), CONTEXT).layout.groups
        assert all(count % 32 == 0 for count, _ in groups)
        rows.append(sum(count * length for count, length in groups))
        tokens += int(lengths.sum())
    assert len(set(rows)) <= 12
    assert sum(rows) < 1.25 * tokens


def model_of(pool):
    torch.manual_seed(0)
    vision = VisionConfig(image_size=16, patch_size=8, width=32, depth=1, heads=2)
    text = TextConfig(context_length=32, width=32, depth=2, heads=2, pool=pool)
    tokenizer = load_tokenizer()
    config = ModelConfig(embed_dim=24, vision=vision, text=text)
    return build_model(config, tokenizer.vocab_size, tokenizer.eot_token).double()


def load(policy="uniform", pad_captions=False, folder=EMOJI / "train"):
    """A batch of 64, and its captions as a padded tensor."""
    settings = {"seed": 3, "global_batch_size": 64, "image_size": 16, "context_length": 32}
    batch, padded = (
        next(
            Loader(
                [open_dataset(folder)],
                DataConfig(captions=policy),
                load_tokenizer(),
                device=torch.device("cpu"),
                pad_captions=pad,
                **settings,
            )
        )
        for pad in (pad_captions, True)
    )
    return batch, padded.captions.token_ids.view(*padded.captions.shape, 32)


def features_and_gradients(model, captions, weight):
    model.zero_grad()
    features = model.encode_text(captions)
    (features * weight.expand_as(features)).sum().backward()
    return features, {n: p.grad.clone() for n, p in model.text.named_parameters()}


@pytest.mark.parametrize("pool", ["eot", "last"])
@pytest.mark.parametrize("policy", ["uniform", "multi"])
def test_the_loaders_captions_give_the_features_and_gradients_of_padded_ones(policy, pool):
    batch, padded = load(policy, pad_captions=pool == "last")
    assert batch.captions.shape == padded.shape[:-1]
    model = model_of(pool)
    weight = torch.randn(64, 24, dtype=torch.float64)
    expected, slopes = features_and_gradients(model, padded, weight)
    found, gradients = features_and_gradients(model, batch.captions, weight)
    assert torch.equal(found, expected)
    assert all(torch.equal(gradients[name], slopes[name]) for name in slopes)
    halves = [batch.captions.part(slice(i, i + 32)) for i in (0, 32)]
    joined = torch.cat([model.encode_text(half) for half in halves], dim=-2)
    torch.testing.assert_close(joined, expected, rtol=0, atol=1e-13)


def test_a_caption_that_holds_an_end_of_text_ends_there(emoji_copy):
    dataset = open_dataset(emoji_copy)
    tables = map(dataset.samples, range(len(dataset.shards)))
    keys = itertools.chain.from_iterable(table.keys() for table in tables)
    lines = [{"key": key, "text": "a cat <|endoftext|> and its dog"} for key in keys]
    (emoji_copy / "odd.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenize(emoji_copy, {"odd": str(emoji_copy / "odd.jsonl")})
    batch, padded = load("multi", folder=emoji_copy)
    odd = open_dataset(emoji_copy).variants.index("odd")
    tokenizer = load_tokenizer()
    cat = [tokenizer.sot_token, *tokenizer.encode("a cat"), tokenizer.eot_token]
    assert set(batch.captions.lengths.view(-1, 64)[odd].tolist()) == {len(cat)}
    assert (padded[odd] == tokenizer.eot_token).sum(dim=1).tolist() == [2] * 64
    model = model_of("eot")
    assert torch.equal(model.encode_text(batch.captions), model.encode_text(padded))
