"""The towers: exactness of packing, keyed patch dropout, precision, and errors."""

import copy
import itertools
import math
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F

from laclip.attention import Layout
from laclip.config import ModelConfig, TextConfig, VisionConfig
from laclip.model import build_model, compile_blocks, kept_patches
from laclip.model_weights import load_weights

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
LENGTHS += [[2 + 37 * i % 64 for i in range(131)]]


def plain_text(tower, token_ids, last=False):
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
        act = hidden * torch.sigmoid(1.702 * hidden) if block.quick_gelu else F.gelu(hidden)
        x = x + block.mlp_out(act)
    if last:
        place = torch.full([len(x)], CONTEXT - 1)
    else:
        place = torch.tensor([row.tolist().index(EOT) for row in token_ids])
    pooled = tower.norm(x)[torch.arange(len(x)), place] @ tower.projection.weight.T
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


def test_text_that_follows_the_first_end_of_text_token_changes_nothing():
    model = build()
    ids = captions([9, 30])
    longer = ids.clone()
    longer[0, 9:20] = 7
    longer[0, 20] = EOT
    assert torch.equal(model.encode_text(ids), model.encode_text(longer))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % EOT
    assert not torch.equal(model.encode_text(ids)[0], model.encode_text(changed)[0])


def test_last_pooling_reads_the_last_place_of_the_padded_caption():
    model = build(text={"pool": "last"}).double()
    ids = captions([9, 30, 77])
    expected = plain_text(model.text, ids.long(), last=True)
    torch.testing.assert_close(model.encode_text(ids), expected, rtol=0, atol=1e-13)


def test_variants_go_through_in_one_pass_and_come_back_in_their_shape():
    model = build()
    ids = torch.stack([captions([9, 30, 4], seed=i) for i in range(5)])
    calls = []
    model.text.register_forward_hook(lambda *call: calls.append(1))
    features = model.encode_text(ids)
    assert features.shape == (5, 3, 24) and len(calls) == 1
    each = torch.stack([model.encode_text(variant) for variant in ids])
    torch.testing.assert_close(features, each, rtol=0, atol=1e-6)


def sequences_one_by_one(q, k, v, bounds, causal):
    """What the packages' variable-length calls are documented to compute."""
    outputs = [
        F.scaled_dot_product_attention(
            *(t[a:b].transpose(0, 1) for t in (q, k, v)), is_causal=causal
        ).transpose(0, 1)
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(outputs)


def stand_in_packages(monkeypatch):
    """flash_attn and xformers need a GPU; here their calls run on plain PyTorch."""

    def flash_attn_func(q, k, v, causal):
        bounds = [i * q.shape[1] for i in range(len(q) + 1)]
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return sequences_one_by_one(*flat, bounds, causal).view(q.shape)

    def flash_attn_varlen_func(q, k, v, bounds, bounds_k, longest, longest_k, causal):
        assert bounds.dtype == bounds_k.dtype == torch.int32 and longest == longest_k
        assert int(bounds.diff().max()) <= longest
        return sequences_one_by_one(q, k, v, bounds.tolist(), causal)

    class BlockDiagonalCausalMask:
        @classmethod
        def from_seqlens(cls, lengths):
            mask = cls()
            mask.bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).tolist()
            return mask

    def memory_efficient_attention(q, k, v, attn_bias=None):
        if attn_bias is None:
            return flash_attn_func(q, k, v, causal=False)
        flat = (t.squeeze(0) for t in (q, k, v))
        return sequences_one_by_one(*flat, attn_bias.bounds, True).unsqueeze(0)

    contents = {
        "flash_attn": [flash_attn_func, flash_attn_varlen_func],
        "xformers": [],
        "xformers.ops": [memory_efficient_attention],
        "xformers.ops.fmha": [],
        "xformers.ops.fmha.attn_bias": [BlockDiagonalCausalMask],
    }
    for name, members in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_captions_without_any_padding_give_the_same_features_and_gradients(backend, monkeypatch):
    stand_in_packages(monkeypatch)
    expected = build().double()
    model = build(attention=backend).double()
    ids = captions([1, 77, 2, 8, 9, 16, 17, 40])
    for each in (expected, model):
        image_features, text_features, _ = each(images(8).double(), ids)
        (image_features * text_features.roll(1, 0)).sum().backward()
    torch.testing.assert_close(
        model.encode_text(ids), expected.encode_text(ids), rtol=0, atol=1e-13
    )
    for (name, a), b in zip(model.named_parameters(), expected.parameters()):
        if name != "logit_scale":
            assert (a.grad - b.grad).norm() <= 1e-12 * b.grad.norm() + 1e-13, name


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
def test_packages_that_take_no_fp32_say_so(backend, monkeypatch):
    stand_in_packages(monkeypatch)
    model = build(attention=backend)
    with pytest.raises(ValueError, match=rf"{backend} computes in bf16 and fp16, found fp32\. Set"):
        model.encode_image(images(2))


def splitmix64(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("key", [0, 1, 12345, 2**62 + 7, -3])
def test_kept_patches_follow_splitmix64(key):
    signed = [
        splitmix64((splitmix64(key % 2**64) + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 17)
    ]
    signed = [h - 2**64 if h >= 2**63 else h for h in signed]
    expected = sorted(sorted(range(16), key=lambda i: signed[i])[:8])
    assert kept_patches(torch.tensor([key]), 16, 0.5)[0].tolist() == expected


def test_every_patch_is_kept_equally_often():
    kept = kept_patches(torch.arange(20000), 16, 0.75)
    assert kept.shape == (20000, 4)
    counts = torch.bincount(kept.flatten(), minlength=16)
    spread = (20000 * 0.25 * 0.75) ** 0.5
    assert (counts - 5000).abs().max() < 4.5 * spread


def test_patch_dropout_repeats_by_key_wherever_the_sample_stands():
    model = build(vision={"patch_dropout": 0.5})
    batch, keys = images(6), torch.arange(6) * 7919
    first = model.encode_image(batch, keys)
    assert torch.equal(first, model.encode_image(batch, keys))
    order = torch.tensor([5, 3, 1])
    torch.testing.assert_close(
        model.encode_image(batch[order], keys[order]), first[order], rtol=0, atol=1e-6
    )
    assert (model.encode_image(batch, keys + 1) - first).abs().amax(dim=1).min() > 1e-3


def test_dropped_patches_do_not_matter_and_kept_ones_keep_their_position():
    model = build(vision={"patch_dropout": 0.5}).double()
    batch, keys = images(3).double().requires_grad_(), torch.tensor([3, 4, 5])
    kept = kept_patches(keys, 16, 0.5)
    model.encode_image(batch, keys).sum().backward()
    touched = batch.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum(dim=(1, 4, 5)).flatten(1) > 0
    assert torch.equal(touched.nonzero()[:, 1].view(3, -1), kept)
    # The same by hand: every patch gets its position, then the kept ones go on.
    tower = model.image
    patches = F.unfold(batch, 8, stride=8).transpose(1, 2)
    x = tower.patch_embedding(patches) + tower.positional_embedding[1:]
    x = torch.stack([row[places] for row, places in zip(x, kept)])
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(3, 1, -1)
    x = tower.norm_pre(torch.cat([first, x], dim=1)).flatten(0, 1)
    features = tower.project(tower.transform(x, Layout(((3, 9),)), torch.arange(0, 27, 9)))
    torch.testing.assert_close(model.encode_image(batch, keys), features, rtol=0, atol=1e-13)


def test_patch_dropout_in_training_asks_for_keys():
    model = build(vision={"patch_dropout": 0.5})
    with pytest.raises(ValueError, match="needs sample_keys in training"):
        model.encode_image(images(2))
    assert model.eval().encode_image(images(2)).shape == (2, 24)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_features_are_unit_length_and_in_the_dtype_of_autocast(dtype):
    model = build()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        image_features, text_features, scale = model(images(5), captions([3, 9, 20, 30, 77]))
    expected = dtype or torch.float32
    for features in (image_features, text_features):
        assert features.dtype == expected
        error = (features.double().norm(dim=1) - 1).abs().max()
        assert error <= torch.finfo(expected).eps
    assert scale.dtype == torch.float32 and scale.shape == ()


def test_autocast_features_are_nearer_to_fp32_than_those_rounded_at_each_step():
    model = build(seed=3)
    batch, ids = images(64), captions([3 + i for i in range(64)])
    truth = model(batch, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch, ids)
        pooled = model.image.pool(batch).bfloat16()
        naive = F.normalize(F.linear(pooled, model.image.projection.weight), dim=1)
    ours, theirs = ((x - truth[0]).norm() for x in (found[0].float(), naive.float()))
    assert ours < theirs
    assert (found[1].float() - truth[1]).norm() / truth[1].norm() < 0.02


@pytest.mark.parametrize(
    ("value", "gradient", "expected"),
    [
        (4.0, -1.0, "passes"),
        (4.0, 1.0, "passes"),
        (5.0, 1.0, "passes"),
        (5.0, -1.0, "stops"),
        (math.log(100), 1.0, "passes"),
        (math.log(100) + 1e-6, -1.0, "stops"),
    ],
)
def test_the_scale_is_at_most_100_and_can_always_fall(value, gradient, expected):
    model = build()
    torch.nn.init.constant_(model.logit_scale, value)
    _, _, scale = model()
    assert scale.item() == pytest.approx(min(math.exp(value), 100.0), rel=1e-6)
    (scale * gradient).backward()
    passed = gradient * scale.item() if expected == "passes" else 0.0
    assert model.logit_scale.grad.item() == pytest.approx(passed, rel=1e-6)


def test_the_scale_is_not_rounded_under_autocast():
    model = build()
    torch.nn.init.constant_(model.logit_scale, 4.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, _, scale = model()
    assert scale.item() == pytest.approx(math.exp(4.6), rel=1e-6)


def test_one_tower_runs_alone_and_siglip_adds_a_bias():
    model = build(siglip=True)
    image_features, text_features, scale, bias = model(images=images(2))
    assert image_features.shape == (2, 24) and text_features is None
    assert bias.item() == -10 and bias.shape == () and model.logit_bias.shape == (1,)
    image_features, text_features, *_ = model(captions=captions([5, 6]))
    assert image_features is None and text_features.shape == (2, 24)
    assert build().logit_bias is None and model.logit_scale.shape == (1,)
    assert scale.item() == pytest.approx(1 / 0.07)


def backward(model):
    model.zero_grad()
    image_features, text_features, scale = model(images(8), captions([2, 9, 9, 20, 21, 22, 40, 77]))
    logits = scale * image_features @ text_features.T
    F.cross_entropy(logits, torch.arange(8)).backward()
    return gradients(model)


def assert_same_gradients(found, expected, tolerance):
    assert found.keys() == expected.keys()
    floor = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=floor)
        assert error <= tolerance, name


def stored_bytes(model):
    """What a forward pass under bf16 keeps for the backward pass."""
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.encode_image(images(8))
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in storages.items() if place not in parameters)


def test_activation_checkpointing_changes_no_gradient_and_stores_less():
    kinds = ("none", "activations", "blocks")
    models = {k: build(vision={"depth": 4}, activation_checkpointing=k) for k in kinds}
    stored = {kind: stored_bytes(model) for kind, model in models.items()}
    # Of 8 images with 17 tokens, in the last block one, a row of 192 numbers; a matrix in bf16.
    rows, matrices = 3 * 8 * 17 + 8, 4 * 48
    assert stored["none"] - stored["activations"] == 2 * 192 * (rows + matrices)
    assert stored["blocks"] < 0.4 * stored["none"]
    expected = backward(models["none"])
    for kind in ("activations", "blocks"):
        assert_same_gradients(backward(models[kind]), expected, 0)


@pytest.mark.parametrize("checkpointing", ["none", "activations"])
def test_compiled_blocks_equal_eager_ones_and_keep_their_names(checkpointing):
    options = {"vision": {"depth": 1, "qk_norm": True}, "text": {"depth": 2}}
    eager = build(**options)
    compiled = build(**options, activation_checkpointing=checkpointing)
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    assert_same_gradients(backward(compiled), backward(eager), 1e-5)


def test_compiled_blocks_take_batches_of_other_lengths_without_new_graphs():
    from torch._dynamo.testing import CompileCounterWithBackend

    model = build()
    counter = CompileCounterWithBackend("aot_eager")
    for block in (*model.image.blocks, *model.text.blocks):
        block.before = torch.compile(block.before, backend=counter, fullgraph=True)
        block.after = torch.compile(block.after, backend=counter, fullgraph=True)
    for ids in (captions([20] * 8), captions([9] * 4 + [30] * 4)):
        model(images(8), ids)
    graphs = counter.frame_count
    for shift in range(3):
        model(images(8), captions([2 + shift, 9, 15 + shift, 20, 30, 40, 50 + shift, 77]))
    assert counter.frame_count == graphs


def test_a_locked_tower_gets_no_gradient_and_the_other_one_does():
    found = backward(build(lock_image=True))
    assert not any(name.startswith("image.") for name in found)
    trainable = {n for n, _ in build().named_parameters() if not n.startswith("image.")}
    assert found.keys() == trainable


def test_weights_come_back_from_a_file_plain_or_wrapped(tmp_path):
    model, other = build(seed=1), build(seed=2)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "wrapped.pt")
    for name in ("plain.pt", "wrapped.pt"):
        fresh = copy.deepcopy(other)
        load_weights(fresh, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters()))


def test_a_file_without_a_part_leaves_that_part_as_it_is(tmp_path):
    state = build(seed=1).state_dict()
    image = {name: tensor for name, tensor in state.items() if name.startswith("image.")}
    torch.save(image, tmp_path / "image.pt")
    torch.save(state, tmp_path / "clip.pt")
    other = build(seed=2)
    expected = {name: tensor.clone() for name, tensor in other.state_dict().items()} | image
    assert load_weights(other, tmp_path / "image.pt") == ["logit_scale", "text"]
    assert all(torch.equal(tensor, expected[n]) for n, tensor in other.state_dict().items())
    sigmoid = build(seed=2, siglip=True)
    assert load_weights(sigmoid, tmp_path / "clip.pt") == ["logit_bias"]
    assert sigmoid.logit_bias.item() == -10
    assert all(
        torch.equal(tensor, state[n]) for n, tensor in sigmoid.state_dict().items() if n in state
    )


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(build(vision={"depth": 3}, text={"width": 64}).state_dict(), path)
    with pytest.raises(ValueError) as error:
        load_weights(build(), path)
    message = str(error.value)
    assert "not in this model: image.blocks.2.attention_out.bias" in message
    assert "text.blocks.0.attention_out.bias [64], expected [32]" in message
    assert "and 7 more" in message and "laclip import" in message and "missing" not in message
    short = {n: t for n, t in build().state_dict().items() if n != "text.norm.bias"}
    torch.save(short, path)
    with pytest.raises(ValueError, match=r"missing: text\.norm\.bias\. "):
        load_weights(build(), path)
    torch.save({"logit_scale": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"missing: image\."):
        load_weights(build(), path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"w\.pt is damaged"):
        load_weights(build(), path)
    with pytest.raises(FileNotFoundError, match=r"model\.weights: no file .*absent"):
        load_weights(build(), tmp_path / "absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": {"image_size": 30}}, "image_size: 30 is no multiple of patch_size 8. Use 24"),
        ({"vision": {"heads": 5}}, "model.vision.width: 48 is no multiple of heads 5"),
        ({"text": {"depth": 0}}, "model.text.depth: found 0, expected 1 or more"),
        ({"text": {"activation": "relu"}}, "found 'relu', expected one of gelu, quick_gelu"),
        ({"text": {"pool": "mean"}}, "model.text.pool: found 'mean', expected one of eot, last"),
        ({"vision": {"patch_dropout": 1.0}}, "found 1.0, expected 0 <= share < 1"),
        ({"attention": "fast"}, "found 'fast', expected one of sdpa, flash_attn, xformers"),
        ({"attention": "flash_attn"}, '--no-build-isolation "laclip[flash-attn]"'),
        ({"attention": "xformers"}, '--no-build-isolation "laclip[xformers]"'),
    ],
)
def test_configurations_that_do_not_fit_are_refused(options, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        build(**options)
    assert message in str(error.value)


def test_inputs_that_do_not_fit_are_refused():
    model = build()
    ids = captions([5, 6])
    with pytest.raises(ValueError, match=r"found shape \[2, 3, 32, 40\].*\[batch, 3, 32, 32\]"):
        model.encode_image(torch.zeros(2, 3, 32, 40))
    with pytest.raises(ValueError, match="found 80 tokens a caption, the model has 77 positions"):
        model.encode_text(torch.tensor([[1] * 79 + [EOT]], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ids from \d+ to 100, the model's vocabulary has 100"):
        model.encode_text(ids.where(ids != ids[0, 0], 100))
    with pytest.raises(ValueError, match=r"ids from -1 to 99"):
        model.encode_text(ids.where(ids != ids[0, 0], -1))
    with pytest.raises(ValueError, match=r"caption 1 has no end-of-text token \(99\)"):
        model.encode_text(torch.stack([ids[0], torch.ones_like(ids[0])]))
    with pytest.raises(ValueError, match="end-of-text token 100 lies outside its vocabulary"):
        build_model(configure(), 100, 100)
