"""DeepSpeed's engine: the ranks connected through it, the model trained by it."""

import contextlib
import ctypes
import datetime
import os
import sys
import time
import typing
import warnings
from pathlib import Path
from typing import Any

import torch

from laclip.config import Config
from laclip.model import CLIP, compile_blocks
from laclip.optimizer import build_optimizer
from laclip.parallel import JointError, Ranks, meet, set_timeouts
from laclip.typed_toml import nearest


def check_abilities(config: Config, device: torch.device) -> None:
    """Raise ValueError for what the first step would find out, when much had been started."""
    attention, cpu = config.model.attention, device.type == "cpu"
    if cpu and attention != "sdpa":
        raise ValueError(
            f"model.attention: {attention} computes on a GPU alone, and this rank has none. Set "
            'model.attention = "sdpa"'
        )
    if attention != "sdpa" and config.train.precision == "fp32":
        raise ValueError(
            f"model.attention: {attention} computes in bf16 and fp16, train.precision is fp32. Set "
            'it to "bf16", or model.attention to "sdpa"'
        )
    if cpu and config.train.loss_implementation == "triton":
        raise ValueError(
            "train.loss_implementation: triton computes on a GPU alone, and this rank has none. "
            'Set it to "auto"'
        )
    if config.model.embed_dim % 8:
        raise ValueError(
            f"model.embed_dim: found {config.model.embed_dim}, the losses need a multiple of 8"
        )


def check_zero(settings: dict[str, Any], path: Path, ranks: Ranks) -> None:
    """Raise ValueError for what DeepSpeed's section zero_optimization may not hold.

    settings: what `path` holds. The last of the checks, as it imports DeepSpeed.
    """
    if ranks.device.type == "cpu":
        _prepare_cpu(ranks)
    import deepspeed
    from pydantic import ValidationError

    known: Any = deepspeed.runtime.zero.config.DeepSpeedZeroConfig
    try:
        known(**settings["zero_optimization"])
    except AssertionError as error:
        raise ValueError(f"{path}: zero_optimization: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        *sections, key = places = "zero_optimization", *map(str, problem["loc"])
        where = ".".join(sections)
        what = f"{'.'.join(places)}: {problem['msg']}"
        if problem["loc"]:  # else the keys disagree, and it is found in the whole section
            what += f", found {problem['input']!r}"
        if problem["type"] == "extra_forbidden":
            for section in sections[1:]:
                kind = known.model_fields[section].annotation
                kinds = kind, *typing.get_args(kind)  # of Optional
                known = next(kind for kind in kinds if hasattr(kind, "model_fields"))
            names = {field.alias or name for name, field in known.model_fields.items()}
            what = f"unknown key {key!r} in {where}{nearest(key, names)}"
        raise ValueError(f"{path}: {what}") from None


def connect(config: Config, ranks: Ranks) -> None:
    """Connect the ranks through DeepSpeed."""
    if ranks.device.type == "cpu":
        _prepare_cpu(ranks)
    # DeepSpeed calls functions that torch has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()  # on a CPU; what fails on one rank fails while the others still listen
    timeout = datetime.timedelta(minutes=config.run.timeout_minutes + 1)
    _store = meet(ranks, timeout)
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def start_engine(model: CLIP, config: Config, settings: dict[str, Any], ranks: Ranks) -> Any:
    """The model under DeepSpeed's engine, with its optimizer."""
    import deepspeed

    model.to(ranks.device)
    if config.train.precision != "fp32":
        # Under autocast inside the engine parameters stay fp32, logit_scale among them: the
        # engine's own bf16 would round it by up to 3 %.
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
        model.forward = torch.autocast(ranks.device.type, precision)(model.forward)  # type: ignore
    if config.train.compile:
        compile_blocks(model)
    optimizer = build_optimizer(
        model,
        learning_rate=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        layer_decay=config.optimizer.layer_decay,
    )
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (AssertionError, deepspeed.DeepSpeedConfigError) as error:
        raise JointError(f"--deepspeed_config: DeepSpeed refuses it: {error}") from error
    # Longer than the watchdog's, which knows the reason.
    set_timeouts(config.run.timeout_minutes + 1)
    return engine


def whole_weights(model: CLIP, stage: int, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The model's weights on the first rank's host; {} on the others."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        if not ranks.is_first:
            return {}
        return {name: p.detach().to("cpu", copy=True) for name, p in model.state_dict().items()}


def _prepare_cpu(ranks: Ranks) -> None:
    """What training on a CPU needs of this process, before DeepSpeed is imported."""
    # Memory once freed is kept: to give it back and get it anew, zeroed, takes a fifth of a step.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The launcher's word that all ranks are on one machine. For it DeepSpeed takes 66 MiB a rank of
    # /dev/shm, which it leaves behind, for an operation of inference that training never calls.
    os.environ.pop("LOCAL_SIZE", None)
    built = Path(sys.prefix) / "torch_extensions"  # by requirements/build_deepspeed_op.py
    if built.is_dir():
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(built))
    lock = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")) / "deepspeed_shm_comm" / "lock"
    if ranks.local_rank == 0 and remove_stale_lock(lock):
        print(f"laclip: removed '{lock}', which a killed process had left", flush=True)


def remove_stale_lock(lock: Path) -> bool:
    """Delete the lock beside DeepSpeed's operator if its process is no more; whether it did.

    A process that builds or loads the operator holds the file open. One that is killed meanwhile
    leaves it, and whoever comes next would wait for it without an end. As processes of other
    machines are not seen, the lock must be older than such work takes.
    """
    seconds = 10 if any(lock.parent.glob("*.so")) else 300
    with contextlib.suppress(FileNotFoundError):
        while lock.stat().st_uid == os.getuid() and not _is_open(lock):
            if abs(time.time() - lock.stat().st_mtime) > seconds:  # clocks are set back, too
                lock.unlink()
                return True
            time.sleep(0.1)
    return False


def _is_open(path: Path) -> bool:
    """Whether a process of this machine and user has the file open."""
    wanted = str(path.resolve())
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False
