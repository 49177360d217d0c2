"""What a run takes, before it starts: steps, memory of a GPU, time, disk.

What a pair keeps for the backward pass is counted, on the CPU, in the model itself: at two depths,
from which the rest follows, as memory is linear in the blocks and in the pairs. What ZeRO holds is
what DeepSpeed 0.19 was seen to allocate (tests/test_plan.py measures both in real steps).
"""

import argparse
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from laclip.captions import pack
from laclip.config import Config, ModelConfig, add_set_option, load_config
from laclip.dataset import CAPTION_MISSING, POSITION_MASK, Dataset, check_datasets, open_dataset
from laclip.engine_settings import engine_settings
from laclip.flops import PEAK_FLOPS, peak_flops, training_flops
from laclip.metrics import duration
from laclip.model import CLIP, build_model, set_recomputation
from laclip.optimizer import schedule_of
from laclip.parallel import Ranks
from laclip.tokenizer import Tokenizer, load_tokenizer

OUTSIDE_PYTORCH = 3e9  # bytes: CUDA's context, NCCL, cuDNN, image decoders (an estimate)
MICRO = "train_micro_batch_size_per_gpu"
CHECKPOINTING = ("none", "activations", "blocks")
LOOKED_AT = 8  # shards of each dataset that the length of captions and images is taken from


class Kept(NamedTuple):
    """Bytes that a pair keeps between its forward and its backward pass."""

    pair: dict[str, float]  # by model.activation_checkpointing
    block: float  # what a block of the image tower keeps, neither locked nor computed again


class Samples(NamedTuple):
    """What a run trains on."""

    total: int
    captions: int  # that a step takes of each image
    tokens: float  # mean length of a caption
    image_bytes: float | None  # mean, encoded; None where the data is not here


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    parser.description = (
        "Tell what a run takes before it starts: steps, memory of a GPU item by item, the largest "
        "micro-batch that fits, time and disk. Needs no GPU and no data set. Exit status 1 where "
        "the run does not fit. All but the assumptions, which are marked, is counted."
    )
    parser.add_argument(
        "--config", default="configs/demo.toml", metavar="TOML", help="the run (%(default)s)"
    )
    parser.add_argument(
        "--deepspeed_config",
        default="configs/deepspeed/zero1.json",
        metavar="JSON",
        help="ZeRO's settings (%(default)s)",
    )
    add_set_option(parser)
    parser.add_argument(
        "--gpus",
        type=int,
        default=torch.cuda.device_count() or 8,
        metavar="N",
        help="on all machines together (%(default)s)",
    )
    parser.add_argument(
        "--gpu",
        default=gpu.name if gpu else "H100",
        metavar="NAME",
        help=f"its kind, for the time: {', '.join(PEAK_FLOPS)} (%(default)s)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=round(gpu.total_memory / 1e9, 1) if gpu else 80.0,
        metavar="GB",
        help="of one GPU, in 10^9 bytes (%(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the GPU's peak that training reaches, an assumption (%(default)s); a run reports "
        "its own as mfu_padded",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="where data.train is not on this machine"
    )


def run(args: argparse.Namespace) -> int:
    for name in ("gpus", "memory", "mfu", "samples"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise ValueError(f"--{name}: found {value:g}, expected more than 0")
    config = load_config(args.config, args.set)
    ranks = Ranks(0, args.gpus, 0, torch.device("cuda", 0))
    settings = engine_settings(Path(args.deepspeed_config), config, ranks)
    tokenizer = load_tokenizer(config.data.tokenizer)
    samples = find_samples(config, args.samples, tokenizer)
    steps = schedule_of(config, samples.total).total_steps
    vocabulary = tokenizer.vocab_size, tokenizer.eot_token
    with torch.device("meta"):
        model = build_model(config.model, *vocabulary, config.train.loss == "siglip")
    chosen = config.model.activation_checkpointing
    kept = count_kept(config, samples, *vocabulary)

    def memory(how: str, micro: int) -> dict[str, float]:
        way = replace(config, model=replace(config.model, activation_checkpointing=how))
        return gpu_memory(way, settings, model, samples, kept, args.gpus, micro)

    local, micro = settings["train_batch_size"] // args.gpus, settings[MICRO]
    items = memory(chosen, micro)
    fits = sum(items.values()) <= 1e9 * args.memory
    image, text = (sum(p.numel() for p in t.parameters()) / 1e6 for t in (model.image, model.text))
    assumed = "" if samples.image_bytes else " (assumed: the data is not here)"
    print(
        f"model    {image + text:.1f} M parameters (image {image:.1f}, text {text:.1f}), "
        f"{training_flops(config.model, captions=samples.captions) / 1e9:.1f} GFLOP a pair\n"
        f"data     {samples.total:,} samples; a step takes {samples.captions} caption(s) of each, "
        f"{samples.tokens:.1f} tokens long{assumed}\n"
        f"batch    {local * args.gpus:,} pairs = {args.gpus} GPU(s) x {local:,}, in "
        f"{local // micro} micro-batch(es) of {micro:,}\n"
        f"steps    {steps:,}, {steps * local * args.gpus / samples.total:.2f} epochs\n\n"
        "memory of a GPU at the peak of a step, GB"
    )
    for name, size in items.items():
        print(f"  {name:58}{size / 1e9:8.2f}")
    verdict = f"total; {args.memory:g} GB: {'fits' if fits else 'DOES NOT FIT'}"
    print(f"  {verdict:58}{sum(items.values()) / 1e9:8.2f}\n")
    print("largest train.micro_batch_size that fits, by model.activation_checkpointing")
    for how in CHECKPOINTING:
        sizes = (n for n in range(local, 0, -1) if local % n == 0)
        largest = (n for n in sizes if sum(memory(how, n).values()) <= 1e9 * args.memory)
        print(f"  {how:12}{next(largest, 'not even 1'):>11}")
    parts = local // micro
    print(f"\n{_time(config, samples, steps, args, parts)}\n{_disk(config, settings, model)}")
    return 0 if fits else 1


def _time(
    config: Config, samples: Samples, steps: int, args: argparse.Namespace, parts: int
) -> str:
    """The lines about time, and about what is read in it."""
    peak = peak_flops(args.gpu)
    if peak is None:
        return f"time     not known for {args.gpu!r}; --gpu knows {', '.join(PEAK_FLOPS)}"
    if config.train.precision == "fp32":
        return "time     not known in fp32: the peaks are those of half precision"
    rate = args.mfu * peak / flops_done(config, samples, parts)
    pairs = steps * config.train.global_batch_size
    line = (
        f"time     {duration(pairs / (rate * args.gpus))} for the steps, {rate:,.0f} pairs/s a GPU"
        f": assumed {100 * args.mfu:g} % of {args.gpu}'s {peak / 1e12:g} TFLOP/s"
    )
    if samples.image_bytes:
        read = rate * args.gpus * samples.image_bytes / 1e9
        line += f"\nreading  {read:.2f} GB/s of images, all GPUs together"
    return line


def _disk(config: Config, settings: dict[str, Any], model: CLIP) -> str:
    size = checkpoint_bytes(settings, model) / 1e9
    # One is being written while the others are still there; the best one is kept apart.
    scored = bool(config.evaluation.every_steps and config.evaluation.tasks)
    count = config.checkpoint.keep + 1 + scored
    return f"disk     {size:.2f} GB a checkpoint, {count * size:.1f} for {count} of them"


def checkpoint_bytes(settings: dict[str, Any], model: CLIP) -> int:
    """Weights and AdamW's moments; ZeRO adds its copy of the weights, and ZeRO-3 has no other.

    ZeRO-2 and ZeRO-3 write what is locked apart.
    """
    weights, trained = count_weights(model)
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    apart = (weights - trained) * (stage >= 2)
    return 4 * (weights * (stage < 3) + apart + trained * (3 if stage else 2))


def flops_done(config: Config, samples: Samples, parts: int) -> float:
    """FLOPs of a pair, what is computed twice included.

    As training_flops counts them, at the full context; but of several captions of an image
    (data.captions = "multi") all but the first at their own length, as the text tower computes no
    padding. parts: micro-batches; the forward pass of all but the last runs twice, where it is not
    locked.
    """

    def once(model: ModelConfig) -> float:
        own = (training_flops(model, samples.tokens, n) for n in (1, samples.captions))
        return training_flops(model) - next(own) + next(own)

    flops, unlocked = (
        once(model)
        for model in (config.model, replace(config.model, lock_image=False, lock_text=False))
    )
    trained = flops - (unlocked - flops) / 2  # a locked forward pass lacks twice as much
    again = (parts - 1) / parts + (config.model.activation_checkpointing == "blocks")
    return flops + trained * again / 3


def find_samples(config: Config, count: int | None, tokenizer: Tokenizer) -> Samples:
    """What the data sets of a run hold; `count` samples where they are not on this machine."""
    data = config.data
    if count is not None:
        return Samples(count, 5 if data.captions == "multi" else 1, 20.0, None)
    if not data.train:
        raise ValueError("data.train: no dataset given. Set it, or say --samples N")
    try:
        datasets = [open_dataset(path) for path in data.train]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Without it: --samples N") from None
    check_datasets(datasets, data, tokenizer.fingerprint)
    lengths, sizes = zip(*(_looked_at(dataset, config, tokenizer) for dataset in datasets))
    weights = [dataset.num_samples for dataset in datasets]
    variants = max(len(dataset.variants) for dataset in datasets)
    return Samples(
        sum(weights),
        variants if data.captions == "multi" else 1,
        float(np.average(lengths, weights=weights)),
        float(np.average(sizes, weights=weights)),
    )


def _looked_at(dataset: Dataset, config: Config, tokenizer: Tokenizer) -> tuple[float, float]:
    """Mean tokens of a caption as the policy draws them, and mean bytes of an image."""
    ends_of_text = 1 if tokenizer.sot_token is None else 2
    variants = len(dataset.variants)
    weights = {"original": [1.0] + [0.0] * (variants - 1), "weights": list(config.data.weights)}
    policy = weights.get(config.data.captions, [1.0] * variants)
    tokens, sizes = [], []
    shards = np.linspace(0, len(dataset.shards) - 1, min(LOOKED_AT, len(dataset.shards)))
    for shard in shards.round().astype(int):
        table = dataset.captions(shard)
        ends = (table.entries & POSITION_MASK).astype(np.int64)
        length = np.minimum(np.diff(ends) + ends_of_text, config.model.text.context_length)
        there = (table.entries[:-1] & CAPTION_MISSING) == 0
        drawn = there * np.tile(policy, len(table))
        tokens.append(np.average(length, weights=drawn) if drawn.any() else 2.0)
        sizes.append(dataset.samples(shard).records["bytes"].mean())
    return float(np.mean(tokens)), float(np.mean(sizes))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it and still there."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.bytes = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: t for t in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_reference: Any) -> None:
            self.bytes -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.bytes += size


def count_kept(config: Config, samples: Samples, vocab_size: int, eot_token: int) -> Kept:
    """What a pair of this run's keeps, counted with models of two and of three blocks a tower."""
    two, three = (_live(config, samples, depth, vocab_size, eot_token) for depth in (2, 3))
    depths = config.model.vision.depth, config.model.text.depth
    pair = {
        how: sum(a + (depth - 2) * (b - a) for a, b, depth in zip(two[how], three[how], depths))
        for how in CHECKPOINTING
    }
    return Kept(pair, three["unlocked"][0] - two["unlocked"][0])


def _live(
    config: Config, samples: Samples, depth: int, vocab_size: int, eot: int
) -> dict[str, tuple[float, float]]:
    """Bytes that each tower keeps of a pair, with `depth` blocks, by what is recomputed."""
    vision, text = config.model.vision, config.model.text
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    # Compiled, QuickGELU keeps what GELU keeps.
    kinds = {"gelu": "gelu", "quick_gelu": "gelu" if config.train.compile else "quick_gelu"}
    shape = replace(
        config.model,
        attention="sdpa",  # all backends keep the same
        vision=replace(vision, depth=depth, activation=kinds[vision.activation]),
        text=replace(text, depth=depth, activation=kinds[text.activation]),
    )
    model = build_model(shape, vocab_size, eot).to(dtype)
    pairs = 2
    images = torch.randn(pairs, 3, vision.image_size, vision.image_size, dtype=dtype)
    length = text.context_length if text.pool == "last" else max(2, round(samples.tokens))
    ids = torch.zeros(pairs * samples.captions, length, dtype=torch.int32)
    ids[:, -1] = eot
    captions = pack(ids, None if text.pool == "last" else eot)
    found = {}
    for how in (*CHECKPOINTING, "unlocked"):
        if how == "unlocked":
            model.requires_grad_()
        set_recomputation(model, how)
        with LiveBytes(images, *model.parameters()) as live:
            features = model.encode_image(images, torch.arange(pairs))
            image = live.bytes
            texts = model.encode_text(captions)
            found[how] = image / pairs, (live.bytes - image) / pairs
        del features, texts
    return found


def gpu_memory(
    config: Config,
    settings: dict[str, Any],
    model: CLIP,
    samples: Samples,
    kept: Kept,
    gpus: int,
    micro: int,
) -> dict[str, float]:
    """Bytes of one GPU at the peak of a step, item by item.

    The peak is where the backward pass begins, or for few pairs the update. Sizes of what lies
    outside of PyTorch come last, under names that begin with DALI and CUDA.
    """
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    local = settings["train_batch_size"] // gpus
    weights, trained = count_weights(model)
    share = f", 1/{gpus} of it (ZeRO-{stage})" if stage and gpus > 1 else ""
    owned = 4 * trained / gpus if stage else 4.0 * trained
    bucket = 4 * int(zero.get("reduce_bucket_size", 5e8))
    away = {
        part
        for part in ("optimizer", "param")
        if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
    }
    overlaps = zero.get("overlap_comm", stage == 3) and gpus > 1
    gathered = 4 * min(weights, int(zero.get("stage3_max_live_parameters", 1e9)))
    held: dict[str, float] = {
        "parameters, fp32" + share * (stage == 3): 4 * weights / (gpus if stage == 3 else 1),
        "optimizer" + share: 3 * owned if stage else 2 * owned,  # ZeRO copies the parameters
    }
    if "optimizer" in away:  # on the host
        held["optimizer" + share] = 0
    if "param" in away:
        held["parameters, fp32" + share] = 0
    gradients: dict[str, float] = {"gradients, fp32": 4 * trained}
    if stage:
        held[f"ZeRO-{stage}'s buckets"] = 2 * bucket if overlaps else bucket
    if stage > 1:  # there from the start; the rest takes the place of what the pass gives free
        held |= (gradients := {"gradients, fp32" + share: owned})
    if stage == 2 and micro < local:
        held["gradients of a micro-batch" + share] = owned
    if stage == 3:
        held["parameters gathered for a pass"] = gathered
        if gpus > 1:  # DeepSpeed gathers many as one and copies them out; the next are under way
            bucket = 4 * min(weights, int(zero.get("stage3_prefetch_bucket_size", 5e7)))
            held["ZeRO-3's buffers to gather them"] = 2 * bucket
    blocks = config.model.activation_checkpointing == "blocks"
    pair = kept.pair[config.model.activation_checkpointing]
    half = 0.0 if config.train.precision == "fp32" else 2.0
    # Autocast's copies of what is trained are kept for the backward pass; of blocks computed again,
    # one at a time.
    half *= sum(
        sum(p.numel() for p in tower.blocks.parameters() if p.requires_grad)
        / (len(tower.blocks) if blocks else 1)
        for tower in (model.image, model.text)
    )
    backward: dict[str, float] = {
        "weights in half precision (autocast)": half,
        f"kept for the backward pass: {micro:,} pairs, {pair / 1e6:.1f} MB each": (micro * pair),
        "working room of the backward pass": micro * kept.block * (2 if blocks else 1),
        "loss": loss_bytes(config, samples.captions, local, settings["train_batch_size"]),
    }
    if micro < local:  # those of the micro-batches before
        backward = gradients | backward
    update = gradients | {"gradients once more, in one piece": owned}
    pixels = 3 * config.model.vision.image_size**2
    image = pixels * (2 if config.train.precision == "bf16" else 4)
    ahead = config.data.prefetch
    return {
        **held,
        **max(backward, update, key=lambda items: sum({**held, **items}.values())),
        "images, this batch's and the next one's": 2 * local * image,
        f"DALI: images of {ahead} batches ahead, as bytes": ahead * local * pixels,
        "CUDA, NCCL, cuDNN, decoders (assumed)": OUTSIDE_PYTORCH,
    }


def count_weights(model: CLIP) -> tuple[int, int]:
    """How many parameters a model has, and how many of them are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def loss_bytes(config: Config, captions: int, local: int, batch: int) -> float:
    """What the Triton losses hold: features of all ranks, a block of G, gradients."""
    size = 4 if config.train.precision == "fp32" else 2
    texts = captions * batch * config.model.embed_dim
    own = (1 + captions) * local * config.model.embed_dim
    rows = min(4096, local)
    gathered = texts * size * (batch > local)
    operands = (texts + rows * config.model.embed_dim) * size * (size == 2)
    return gathered + operands + 4 * texts + rows * batch * size + own * (size + 4)
