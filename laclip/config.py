"""The configuration of a run: defaults, then a TOML file, then --set; unknown keys are errors.

Frozen dataclasses, one a section; every knob has one home. What ZeRO needs lives in DeepSpeed's
JSON, which may not repeat anything that stands here (laclip/engine_settings.py merges the two).
"""

import argparse
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path

from laclip.typed_toml import build, flatten, nearest, parse


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what it draws from."""

    folder: str = "runs/demo"
    seed: int = 0
    timeout_minutes: float = 10.0  # a rank that is silent or stands still for so long ends the job


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how an image and a caption are drawn from it."""

    train: tuple[str, ...] = ()  # dataset folders; their samples are one list
    tokenizer: str = "clip"  # clip | sentencepiece:FILE
    captions: str = "uniform"  # uniform | weights | original | multi
    weights: tuple[float, ...] = ()  # one a variant, for captions = "weights"
    crop_scale: tuple[float, float] = (0.5, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # width over height
    flip: bool = False
    interpolation: str = "cubic"  # cubic | linear; both antialiased
    exif_rotation: bool = False  # turn images as their EXIF data says (PIL and open_clip do not)
    normalize: str = "openai"  # openai | imagenet | inception: mean and standard deviation
    window_shards: int = 16  # samples are shuffled inside windows of this many shards
    reader_threads: int = 2
    decode_threads: int = 2
    prefetch: int = 2  # batches read ahead, and again as many decoded ahead
    hardware_decoder_share: float = 0.75  # of the GPU's JPEG engine; CPU decoding ignores it
    max_bad_fraction: float = 0.001  # of the samples read; clearly more stops the run, 0: any
    max_pixels: int = 100_000_000  # larger images count as bad and are never decoded


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at a time, and in which arithmetic."""

    global_batch_size: int = 512
    micro_batch_size: int = 0  # at most so many a rank in one pass; 0: all of its share at once
    epochs: float = 0.0  # give epochs or steps
    steps: int = 0
    loss: str = "clip"  # clip | siglip
    label_smoothing: float = 0.0
    loss_implementation: str = "auto"  # auto | triton | chunked | reference
    precision: str = "fp32"  # fp32 | bf16 | fp16
    compile: bool = False  # torch.compile, block by block
    max_skipped_steps: int = 20  # this many non-finite steps in a row stop the run


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW; linear warm-up, then cosine. Tensors of fewer than 2 dimensions do not decay."""

    lr: float = 1e-3
    start_lr: float = 1e-6
    end_lr: float = 1e-5
    warmup_steps: int = 0  # give steps or epochs
    warmup_epochs: float = 0.0
    weight_decay: float = 0.5
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip_norm: float = 0.0  # 0: no clipping
    layer_decay: float = 1.0  # learning rate of a block against that of the next


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is written, and how many are kept."""

    every_steps: int = 1000
    every_minutes: float = 0.0  # 0: by steps alone
    keep: int = 2


@dataclass(frozen=True)
class TaskConfig:
    """A held-out task: images against a dataset's distinct captions, or names of classes."""

    data: str = ""  # a dataset's folder; for zero_shot what docs/evaluation.md lists
    direction: str = "image_to_text"  # image_to_text | text_to_image | zero_shot
    classnames: str = ""  # of zero_shot: FILE | imagenet; empty: found as docs/evaluation.md tells
    templates: str = ""  # of zero_shot: simple | openai | FILE; empty: likewise


@dataclass(frozen=True)
class EvaluationConfig:
    """What is scored, and when; the checkpoint with the best mean score is kept."""

    every_steps: int = 0  # 0: at the end of the run alone
    batch_size: int = 256
    tasks: dict[str, TaskConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class LogConfig:
    """What a run writes besides its checkpoints."""

    every_steps: int = 1
    tensorboard: bool = True
    wandb_project: str = ""  # empty: no Weights & Biases


@dataclass(frozen=True)
class VisionConfig:
    """The image tower: a vision transformer with a class token and learned positions."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # gelu | quick_gelu
    qk_norm: bool = False  # LayerNorm over head_dim on queries and keys (eps 1e-6)
    pre_norm: bool = True  # a LayerNorm before the first block (OpenAI's ln_pre)
    patch_bias: bool = False  # bias of the patch convolution
    layer_norm_eps: float = 1e-5
    patch_dropout: float = 0.0  # share of patches left out in training


@dataclass(frozen=True)
class TextConfig:
    """The text tower: a causal transformer."""

    context_length: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_ratio: float = 4.0
    activation: str = "gelu"  # gelu | quick_gelu
    layer_norm_eps: float = 1e-5
    pool: str = "eot"  # eot: at the first end-of-text token | last: at the last token


@dataclass(frozen=True)
class ModelConfig:
    """Two towers and their common embedding. A preset fills what the file leaves out."""

    preset: str = ""
    embed_dim: int = 512
    attention: str = "sdpa"  # sdpa | flash_attn | xformers
    init_logit_scale: float = 2.6592600369327783  # ln(1 / 0.07)
    activation_checkpointing: str = "none"  # none | activations | blocks: computed twice, not kept
    lock_image: bool = False  # LiT: the image tower's parameters stay as they are
    lock_text: bool = False
    weights: str = ""  # start from this checkpoint file
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


def _preset(embed_dim, patch, width, depth, heads, text_width, text_depth, text_heads, **more):
    vision = {"patch_size": patch, "width": width, "depth": depth, "heads": heads}
    text = {"width": text_width, "depth": text_depth, "heads": text_heads}
    vision |= more.get("vision", {})
    text |= more.get("text", {})
    return {"embed_dim": embed_dim, "vision": vision, "text": text}


_LACLIP = {
    "vision": {"qk_norm": True, "pre_norm": False, "patch_bias": True, "layer_norm_eps": 1e-6},
    "text": {"activation": "quick_gelu"},
}

# The paper's two families: its own models (CC3M, CC12M, RedCaps) and open_clip's (LAION-400M).
PRESETS = {
    "laclip_vit_s_16": _preset(512, 16, 384, 12, 12, 512, 12, 8, **_LACLIP),
    "laclip_vit_b_16": _preset(512, 16, 768, 12, 12, 512, 12, 8, **_LACLIP),
    "laclip_vit_l_16": _preset(512, 16, 1024, 24, 16, 512, 12, 8, **_LACLIP),
    "vit_b_32": _preset(512, 32, 768, 12, 12, 512, 12, 8),
    "vit_b_16": _preset(512, 16, 768, 12, 12, 512, 12, 8),
    "vit_l_14": _preset(768, 14, 1024, 24, 16, 768, 12, 12),
    "vit_h_14": _preset(1024, 14, 1280, 32, 16, 1024, 24, 16),
}


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)


_CHOICES = {
    "data.captions": ("uniform", "weights", "original", "multi"),
    "data.interpolation": ("cubic", "linear"),
    "data.normalize": ("openai", "imagenet", "inception"),
    "model.attention": ("sdpa", "flash_attn", "xformers"),
    "model.activation_checkpointing": ("none", "activations", "blocks"),
    "model.vision.activation": ("gelu", "quick_gelu"),
    "model.text.activation": ("gelu", "quick_gelu"),
    "model.text.pool": ("eot", "last"),
    "train.loss": ("clip", "siglip"),
    "train.loss_implementation": ("auto", "triton", "chunked", "reference"),
    "train.precision": ("fp32", "bf16", "fp16"),
}

# Numbers are finite and not negative (a logarithm may be), and above 0 where their default is, but
_MAY_BE_0 = (
    "data.hardware_decoder_share",
    "data.max_bad_fraction",
    "model.init_logit_scale",
    "optimizer.start_lr",
    "optimizer.end_lr",
    "optimizer.weight_decay",
    "optimizer.betas",
    "optimizer.eps",
)
_AT_MOST = {
    "run.timeout_minutes": 1e6,
    "data.crop_scale": 1,
    "data.hardware_decoder_share": 1,
    "data.max_bad_fraction": 1,
    "model.init_logit_scale": 5,  # a logarithm, that training holds at 4.6
    "train.label_smoothing": 1,
    "optimizer.betas": 1,
    "optimizer.layer_decay": 1,
}

_DIRECTIONS = ("image_to_text", "text_to_image", "zero_shot")

# Keys whose change leaves the sequence of batches and updates as it is, so that a run may go on
# under another value.
RUNTIME_KEYS = (
    "run.folder",
    "run.timeout_minutes",
    "data.train",  # a checkpoint holds the fingerprints: the same data may lie elsewhere
    "data.reader_threads",
    "data.decode_threads",
    "data.prefetch",
    "data.hardware_decoder_share",
    "data.max_bad_fraction",
    "model.weights",
    "train.micro_batch_size",
    "train.max_skipped_steps",
    "checkpoint",
    "evaluation",
    "log",
)


def load_config(path: str | Path | None, overrides: typing.Iterable[str] = ()) -> Config:
    """Read a run's configuration.

    path: a TOML file, or None for the defaults alone. overrides: `section.key=value`, the value
    in TOML's syntax (a bare word is taken as a string, in a list too). Raises FileNotFoundError for
    a missing file and ValueError, naming the key, for anything else that is wrong.
    """
    tree: dict = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--config: there is no file {str(path)!r}")
        try:
            tree = tomllib.loads(Path(path).read_text())
        except ValueError as error:  # bytes that are no text, too
            raise ValueError(f"{path}: not valid TOML: {error}") from None
    written = flatten(tree)
    given = set()
    for override in overrides:
        key, sign, text = override.partition("=")
        given.add(key.strip())
        if not sign or not key.strip():
            raise ValueError(f"--set {override!r}: expected section.key=value")
        *sections, leaf = key.strip().split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"--set {override!r}: {section} is not a section")
        node[leaf] = parse(text.strip())
    source = str(path) if path is not None else "--set"
    model = tree.get("model")
    if isinstance(model, dict) and model.get("preset"):
        tree["model"] = _with_preset(model, source)
        preset = flatten(PRESETS[model["preset"]], "model.") if "model.preset" in given else {}
        kept = [k for k in preset if k in written.keys() - given and written[k] != preset[k]]
        if kept:
            raise ValueError(
                f"--set model.preset={model['preset']}: {source} gives {', '.join(kept)} itself, "
                "which the preset does not change. Start from a file that leaves them out"
            )
    config = build(Config, tree, "", source)
    _check(config, source)
    return config


def add_set_option(
    parser: argparse.ArgumentParser, example: str = "optimizer.lr=5e-4 train.steps=100"
) -> None:
    """The option whose words are load_config's overrides."""
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help=f"override keys of the configuration, e.g. --set {example}",
    )


def differences(old: Config, new: Config) -> list[str]:
    """What differs between two configurations and would change a run, as `key: old -> new`."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and not any(key == runtime or key.startswith(runtime + ".") for runtime in RUNTIME_KEYS)
    ]


def _with_preset(model: dict, source: str) -> dict:
    name = model["preset"]
    if name not in PRESETS:
        raise ValueError(
            f"{source}: model.preset: there is no preset {name!r}{nearest(str(name), PRESETS)}"
        )
    merged = {**PRESETS[name], **model}
    for tower in ("vision", "text"):
        given = model.get(tower, {})
        merged[tower] = {**PRESETS[name][tower], **given} if isinstance(given, dict) else given
    return merged


def _check(config: Config, source: str) -> None:
    leaves = flatten(config)
    for key, choices in _CHOICES.items():
        if leaves[key] not in choices:
            hint = nearest(leaves[key], choices)
            raise ValueError(f"{source}: {key}: {leaves[key]!r} is not a choice{hint}")
    for name, task in config.evaluation.tasks.items():
        where = f"{source}: evaluation.tasks.{name}"
        if task.direction not in _DIRECTIONS:
            raise ValueError(
                f"{where}.direction: {task.direction!r} is not a choice"
                f"{nearest(task.direction, _DIRECTIONS)}"
            )
        for key in ("classnames", "templates"):
            if getattr(task, key) and task.direction != "zero_shot":
                raise ValueError(f"{where}.{key}: only read with direction = 'zero_shot'")
    defaults = flatten(Config())
    for key, value in leaves.items():
        values = value if isinstance(value, tuple) else (value,)
        for number in (n for n in values if type(n) in (int, float)):
            if number <= 0 and defaults.get(key) and key not in _MAY_BE_0:
                raise ValueError(f"{source}: {key}: must be above 0, found {number!r}")
            low = -100 if key == "model.init_logit_scale" else 0
            high = _AT_MOST.get(key, 1e38 if isinstance(number, float) else 2**63 - 1)
            if not low <= number <= high:
                raise ValueError(f"{source}: {key}: expected {low} to {high:g}, found {number!r}")
    for key in ("optimizer.start_lr", "optimizer.end_lr"):
        if leaves[key] > (lr := config.optimizer.lr):
            raise ValueError(f"{source}: {key}: {leaves[key]:g} is above optimizer.lr, {lr:g}")
    for name in ("train.", "optimizer.warmup_"):
        pair = f"{name}epochs", f"{name}steps"
        if all(leaves[key] for key in pair):
            raise ValueError(f"{source}: {' and '.join(pair)}: give one of the two, found both")
    if config.train.label_smoothing and config.train.loss != "clip":
        raise ValueError(f"{source}: train.label_smoothing: only read with train.loss = 'clip'")
    for key, end in (("data.crop_scale", " <= 1"), ("data.crop_ratio", "")):
        low, high = leaves[key]
        if low > high:
            raise ValueError(f"{source}: {key}: expected 0 < low <= high{end}, found {low, high}")
    if config.data.captions == "weights" and not sum(config.data.weights):
        raise ValueError(
            f"{source}: data.weights: captions = 'weights' needs a weight a variant, not all zero; "
            f"found {list(config.data.weights)}"
        )
    if config.data.weights and config.data.captions != "weights":
        raise ValueError(f"{source}: data.weights: only read with data.captions = 'weights'")
