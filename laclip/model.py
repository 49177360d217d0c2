"""The model: an image tower and a text tower with a common embedding.

The towers' blocks work on rows, one a token, of several sequences one after the other: the text
tower lays its captions out by length and leaves out what follows the end-of-text token, which is
exact because later tokens touch nothing that is read. The last block computes only the pooled rows.
"""

import importlib.util
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from laclip.attention import Layout, attend, group_captions, join_captions
from laclip.captions import PackedCaptions, pack

if TYPE_CHECKING:
    from laclip.config import ModelConfig, TextConfig, VisionConfig

MAX_LOG_SCALE = math.log(100.0)
ACTIVATIONS = ("gelu", "quick_gelu")
ATTENTION_PACKAGES = {"sdpa": "torch", "flash_attn": "flash_attn", "xformers": "xformers"}


class LayerNorm(nn.LayerNorm):
    """Layer normalization that returns its input's dtype, under autocast too.

    On a GPU it computes in that dtype (with statistics and sums in fp32): autocast would widen the
    input first, for five times the memory traffic and twice the memory kept for the backward pass.
    A CPU sums the gradients of weight and bias in bf16, so there the input is widened.
    """

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype if input.is_cuda else self.weight.dtype
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            output = F.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return output.to(input.dtype)


class FinalNorm(nn.LayerNorm):
    """Layer normalization in its parameters' dtype, under autocast too.

    It widens its input itself: ZeRO-3 takes a parameter that another module reads for that one's,
    from then on, and its record of the modules' order no longer fits.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class Block(nn.Module):
    """A pre-norm transformer block; with `pooled`, all but its attention on those rows alone.

    `before` and `after` are what compile_blocks compiles: they see rows alone. The attention
    between them stays out of the graphs, as the captions' groups would make a new one a batch.
    """

    def __init__(self, config: "VisionConfig | TextConfig", qk_norm: bool, causal: bool, backend):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.causal, self.backend = config.heads, causal, backend
        self.quick_gelu = config.activation == "quick_gelu"
        self.norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = LayerNorm(width // config.heads, eps=1e-6) if qk_norm else None
        self.k_norm = LayerNorm(width // config.heads, eps=1e-6) if qk_norm else None
        self.attention_out = nn.Linear(width, width)
        self.norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.recompute = False

    def forward(self, x: Tensor, layout: Layout, pooled: Tensor | None = None) -> Tensor:
        q, k, v = self.before(x)
        attended = attend(q, k, v, layout, self.causal, self.backend).reshape(x.shape)
        if pooled is not None:
            x, attended = x.index_select(0, pooled), attended.index_select(0, pooled)
        return self.after(x, attended)

    def before(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [rows, width] to queries, keys and values [rows, heads, head_dim]."""
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.attention_out(attended)
        hidden = self.mlp_in(self.norm2(x))
        return x + (_again(self.end, hidden) if self.recompute else self.end(hidden))

    def end(self, hidden: Tensor) -> Tensor:
        """The end of the MLP; computed again, it need not keep the activation's output."""
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        return self.mlp_out(hidden)


class Tower(nn.Module):
    """What both towers share: blocks, pooling, the final norm and the projection."""

    def __init__(self, config: "VisionConfig | TextConfig", embed_dim: int, **attention):
        super().__init__()
        self.recompute = False
        self.blocks: Any = nn.ModuleList([Block(config, **attention) for _ in range(config.depth)])
        self.norm = FinalNorm(config.width, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=config.width**-0.5)

    def transform(self, x: Tensor, layout: Layout, pooled: Tensor) -> Tensor:
        """Rows [rows, width] to the pooled rows [pooled, width], normalized, fp32."""
        for block in self.blocks:
            inputs = x, layout, pooled if block is self.blocks[-1] else None
            x = _again(block, *inputs) if self.recompute else block(*inputs)
        return self.norm(x)

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled rows [pooled, width] to unit-length features [pooled, embed_dim].

        Projected and normalized in fp32 (a few rows: no cost), then rounded once to autocast's
        dtype: the features carry one rounding of their own, not three.
        """
        device = pooled.device.type
        with torch.autocast(device, enabled=False):
            features = F.normalize(self.projection(pooled), dim=-1)
        return features.to(_compute_dtype(features))


def _again(call: Any, *inputs: Any) -> Tensor:
    """Calls, and for the backward pass calls again instead of keeping what the call computed."""
    if torch.is_grad_enabled():
        return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)
    return call(*inputs)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class VisionTransformer(Tower):
    """The image tower: [batch, 3, size, size] to unit-length features [batch, embed_dim]."""

    def __init__(self, config: "VisionConfig", embed_dim: int, backend: str):
        super().__init__(config, embed_dim, qk_norm=config.qk_norm, causal=False, backend=backend)
        width, self.patch_size = config.width, config.patch_size
        self.image_size, self.patch_dropout = config.image_size, config.patch_dropout
        self.patches = (config.image_size // config.patch_size) ** 2
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=config.patch_bias)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.patches + 1, width))
        self.norm_pre = LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else None
        if config.pre_norm:
            # open_clip: PyTorch's defaults, of nn.MultiheadAttention in the attention.
            nn.init.normal_(self.class_embedding, std=width**-0.5)
            nn.init.normal_(self.positional_embedding, std=width**-0.5)
            for block in self.blocks:
                nn.init.xavier_uniform_(block.qkv.weight)
                nn.init.zeros_(block.qkv.bias)
                nn.init.zeros_(block.attention_out.bias)
        else:
            # LaCLIP's release: timm's embeddings; its own blocks replace timm's after timm's
            # initialization has run, so that their linear layers keep PyTorch's defaults.
            nn.init.normal_(self.class_embedding, std=1e-6)
            nn.init.trunc_normal_(self.positional_embedding, std=0.02)

    def forward(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        return self.project(self.pool(images, sample_keys))

    def pool(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Images to the normalized class token [batch, width], fp32, before the projection."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images: found shape {list(images.shape)}, the model expects "
                f"[batch, 3, {self.image_size}, {self.image_size}]. Set data's image size or "
                "model.vision.image_size"
            )
        batch, side = len(images), self.image_size // self.patch_size
        patches = images.unflatten(3, (side, -1)).unflatten(2, (side, -1))
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        # One pass over the images moves and rounds them.
        patches = patches.to(_compute_dtype(images), memory_format=torch.contiguous_format)
        patches = patches.reshape(batch, self.patches, -1)
        positions = self.positional_embedding[1:].to(patches.dtype)
        if self.training and self.patch_dropout > 0:
            if sample_keys is None:
                raise ValueError(
                    "model.vision.patch_dropout needs sample_keys in training, found None: pass "
                    "an int64 key for each sample, equal for equal draws"
                )
            kept = kept_patches(sample_keys, self.patches, self.patch_dropout)
            patches = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
            positions = F.embedding(kept, positions)
        x = self.patch_embedding(patches) + positions
        first = (self.class_embedding + self.positional_embedding[0]).to(x.dtype)
        x = torch.cat([first.expand(batch, 1, -1), x], dim=1)
        tokens = x.shape[1]
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        pooled = torch.arange(0, batch * tokens, tokens, device=x.device)
        return self.transform(x.flatten(0, 1), Layout(((batch, tokens),)), pooled)


class TextTransformer(Tower):
    """The text tower: packed captions to unit-length features [captions, embed_dim]."""

    def __init__(
        self, config: "TextConfig", embed_dim: int, backend: str, vocab_size: int, eot_token: int
    ):
        super().__init__(config, embed_dim, qk_norm=False, causal=True, backend=backend)
        width, self.context_length = config.width, config.context_length
        self.vocab_size, self.eot_token, self.backend = vocab_size, eot_token, backend
        self.pools_at_eot = config.pool == "eot"
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        # As OpenAI's CLIP, open_clip and LaCLIP's release do.
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        for block in self.blocks:
            out_std = width**-0.5 * (2 * config.depth) ** -0.5
            nn.init.normal_(block.qkv.weight, std=width**-0.5)
            nn.init.zeros_(block.qkv.bias)
            nn.init.normal_(block.attention_out.weight, std=out_std)
            nn.init.zeros_(block.attention_out.bias)
            nn.init.normal_(block.mlp_in.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp_out.weight, std=out_std)

    def forward(self, captions: PackedCaptions) -> Tensor:
        device, tokens = self.positional_embedding.device, self.context_length
        self.check(captions)
        if self.backend == "sdpa":
            rows = group_captions(captions, tokens)
        else:
            rows = join_captions(captions, tokens, self.backend)
        ids, places, pooled = (to_device(t, device) for t in rows[:3])
        layout = rows.layout
        if isinstance(layout.bounds, Tensor):
            layout = layout._replace(bounds=to_device(layout.bounds, device))
        x = self.token_embedding(ids) + F.embedding(places, self.positional_embedding)
        return self.project(self.transform(x.to(_compute_dtype(x)), layout, pooled))

    def check(self, captions: PackedCaptions) -> None:
        """Refuses captions that are too long, hold ids out of range or have no end of text."""
        ends = captions.token_ids[captions.cu_seqlens[1:] - 1] == self.eot_token
        low, high = torch.aminmax(captions.token_ids)
        facts = torch.stack([captions.lengths.max(), low, high, ends.all()])
        longest, low, high, ended = facts.tolist()
        if longest > self.context_length:
            raise ValueError(
                f"token_ids: found {longest} tokens a caption, the model has "
                f"{self.context_length} positions. Set model.text.context_length = {longest} or "
                "tokenize again"
            )
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"token_ids: found ids from {low} to {high}, the model's vocabulary has "
                f"{self.vocab_size}. Tokenize with the model's tokenizer: laclip tokenize"
            )
        if self.pools_at_eot and not ended:
            raise ValueError(
                f"token_ids: caption {int(ends.int().argmin())} has no end-of-text token "
                f"({self.eot_token}). Tokenize with the model's tokenizer: laclip tokenize"
            )


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copies to an accelerator without waiting for what it computes: that takes pinned memory."""
    if host.device.type == "cpu" and device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def kept_patches(sample_keys: Tensor, patches: int, dropout: float) -> Tensor:
    """Chooses the patches that each sample keeps, as a function of its key alone.

    Each (key, patch) gets splitmix64's hash; the patches with the smallest are kept.
    sample_keys: [batch] int64. Returns [batch, max(1, int(patches * (1 - dropout)))] int64,
    ascending.
    """
    kept = max(1, int(patches * (1 - dropout)))
    index = torch.arange(1, patches + 1, device=sample_keys.device)
    # 64-bit constants as signed numbers; int64 products wrap, and the shifts are made logical.
    z = _mix(sample_keys.long())[:, None] + index * -0x61C8864680B583EB
    return _mix(z).argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


class _ClampScale(torch.autograd.Function):
    """min(x, ln 100), whose gradient is stopped only where descent would push x further out."""

    @staticmethod
    def forward(ctx, log_scale):
        ctx.save_for_backward(log_scale)
        return log_scale.clamp(max=MAX_LOG_SCALE)

    @staticmethod
    def backward(ctx, gradient):
        (log_scale,) = ctx.saved_tensors
        outward = (log_scale >= MAX_LOG_SCALE) & (gradient < 0)
        return gradient.masked_fill(outward, 0.0)


class CLIP(nn.Module):
    """An image tower, a text tower, and the scale (for the sigmoid loss also the bias) of logits.

    logit_scale is a logarithm, fp32, of shape [1] as DeepSpeed needs it; so is logit_bias.
    """

    logit_bias: nn.Parameter | None

    def __init__(self, image: VisionTransformer, text: TextTransformer, init_logit_scale: float):
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.full([1], init_logit_scale))
        self.register_parameter("logit_bias", None)  # build_model(siglip=True) sets it

    def encode_image(self, images: Tensor, sample_keys: Tensor | None = None) -> Tensor:
        """Unit-length features [batch, embed_dim] of images [batch, 3, size, size].

        sample_keys: [batch] int64, needed where patch dropout is active (training only). Features
        have autocast's dtype; without autocast the parameters'.
        """
        return self.image(images, sample_keys)

    def encode_text(self, captions: Tensor | PackedCaptions) -> Tensor:
        """Unit-length features [..., embed_dim] of captions [...], in one pass.

        captions: packed, or padded token ids [..., tokens] int32. They are laid out on the host,
        which waits for nothing unless padded ones lie on an accelerator.
        """
        if isinstance(captions, Tensor):
            captions = pack(captions, self.text.eot_token if self.text.pools_at_eot else None)
        return self.text(captions).unflatten(0, captions.shape)

    def forward(
        self,
        images: Tensor | None = None,
        captions: Tensor | PackedCaptions | None = None,
        sample_keys: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Returns (image_features, text_features, logit_scale), and logit_bias where there is one.

        The features of a tower whose input is None are None. logit_scale: 0-d fp32,
        exponentiated, at most 100; logit_bias: 0-d fp32.
        """
        image_features = None if images is None else self.encode_image(images, sample_keys)
        text_features = None if captions is None else self.encode_text(captions)
        logit_scale = _ClampScale.apply(self.logit_scale.float()).exp().squeeze(0)
        if self.logit_bias is None:
            return image_features, text_features, logit_scale
        return image_features, text_features, logit_scale, self.logit_bias.float().squeeze(0)


def build_model(
    config: "ModelConfig", vocab_size: int, eot_token: int, siglip: bool = False
) -> CLIP:
    """Builds a model with fresh weights from torch's generator.

    vocab_size, eot_token: the tokenizer's. siglip: add logit_bias, starting at -10 (arXiv
    2303.15343). Raises ValueError where the configuration does not fit together.
    """
    check_config(config, vocab_size, eot_token)
    image = VisionTransformer(config.vision, config.embed_dim, config.attention)
    text = TextTransformer(config.text, config.embed_dim, config.attention, vocab_size, eot_token)
    model = CLIP(image, text, config.init_logit_scale)
    if siglip:
        model.logit_bias = nn.Parameter(torch.full([1], -10.0))
    set_recomputation(model, config.activation_checkpointing)
    lock_towers(model, config)
    return model


def lock_towers(model: CLIP, config: "ModelConfig", fresh: Iterable[str] = ()) -> None:
    """Sets which parameters train; fresh: what load_weights found nothing of.

    A projection that begins anew is trained even where its tower is locked.
    """
    for name, locked in (("image", config.lock_image), ("text", config.lock_text)):
        tower = getattr(model, name)
        tower.requires_grad_(not locked)
        tower.projection.requires_grad_(not locked or f"{name}.projection" in fresh)


def set_recomputation(model: CLIP, how: str) -> None:
    """Chooses what the backward pass computes again; how: of model.activation_checkpointing."""
    for tower in (model.image, model.text):
        tower.recompute = how == "blocks"
        for block in tower.blocks:
            block.recompute = how == "activations"


def check_config(config: "ModelConfig", vocab_size: int, eot_token: int) -> None:
    """Raises ValueError where the model's configuration does not fit together."""
    vision, text = config.vision, config.text
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"model.vision.image_size: {vision.image_size} is no multiple of patch_size "
            f"{vision.patch_size}. Use {vision.image_size // vision.patch_size * vision.patch_size}"
        )
    for name, tower in (("vision", vision), ("text", text)):
        if tower.width % tower.heads:
            raise ValueError(
                f"model.{name}.width: {tower.width} is no multiple of heads {tower.heads}"
            )
        if tower.depth < 1:
            raise ValueError(f"model.{name}.depth: found {tower.depth}, expected 1 or more")
    if not 0 <= vision.patch_dropout < 1:
        raise ValueError(
            f"model.vision.patch_dropout: found {vision.patch_dropout}, expected 0 <= share < 1"
        )
    if text.context_length < 3:
        raise ValueError(
            f"model.text.context_length: found {text.context_length}, expected 3 or more: the "
            "start, a token, the end"
        )
    for key, found, choices in (
        ("vision.activation", vision.activation, ACTIVATIONS),
        ("text.activation", text.activation, ACTIVATIONS),
        ("text.pool", text.pool, ("eot", "last")),
        ("attention", config.attention, tuple(ATTENTION_PACKAGES)),
    ):
        if found not in choices:
            raise ValueError(f"model.{key}: found {found!r}, expected one of {', '.join(choices)}")
    if not 0 <= eot_token < vocab_size:
        raise ValueError(
            f"tokenizer: end-of-text token {eot_token} lies outside its vocabulary of {vocab_size}"
        )
    if importlib.util.find_spec(ATTENTION_PACKAGES[config.attention]) is None:
        extra = config.attention.replace("_", "-")
        raise ValueError(
            f"model.attention: {config.attention!r} needs the package {extra}, which is not "
            # flash-attn comes as source, and its build asks the installed torch for its CUDA.
            f'installed. Run: pip install --no-build-isolation "laclip[{extra}]", or set '
            'model.attention = "sdpa"'
        )


def compile_blocks(model: CLIP) -> None:
    """Compiles every block in place; parameters and their names stay as they are.

    One graph serves all blocks of a tower, and any number of rows from the second number on. They
    count together against PyTorch's limit, which is raised: beyond it blocks would run uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for tower in (model.image, model.text):
        for block in tower.blocks:
            block.before = torch.compile(block.before)
            block.after = torch.compile(block.after)
