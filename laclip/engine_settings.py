"""DeepSpeed's JSON, completed from the run's TOML, which owns all but ZeRO and its tuning."""

import difflib
import json
from pathlib import Path
from typing import Any

from laclip.config import Config
from laclip.metrics import say
from laclip.parallel import Ranks

FILLED = {  # keys of DeepSpeed's JSON whose values the TOML owns
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "gradient_clipping": "optimizer.clip_norm",
}
_SCHEDULE = "the optimizer and its schedule are set in the TOML's section [optimizer]"
NOT_READ = {  # sections of DeepSpeed's JSON, and what there is instead
    "optimizer": _SCHEDULE,
    "scheduler": _SCHEDULE,
    "checkpoint": "laclip knows how to write and load one; when is set in the TOML's [checkpoint]",
}


def engine_settings(path: Path, config: Config, ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's JSON, with what the TOML owns filled in. Raises ValueError on a conflict."""
    if not path.is_file():
        raise FileNotFoundError(f"--deepspeed_config: there is no file {str(path)!r}")
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:  # bytes that are no text, too
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    zero = settings.setdefault("zero_optimization", {}) if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or type(zero.get("stage", 0)) is not int:
        raise ValueError(
            f'{path}: expected an object with "zero_optimization": {{"stage": 0, 1, 2 or 3, ...}}'
        )
    # DeepSpeed passes over a key that it does not know, and would train without ZeRO.
    for key in difflib.get_close_matches("zero_optimization", settings, cutoff=0.8):
        if key != "zero_optimization":
            raise ValueError(f"{path}: unknown key {key!r}; did you mean 'zero_optimization'?")
    for key in [key for key, value in zero.items() if value == "auto"]:
        del zero[key]  # DeepSpeed takes its default then
    # With these DeepSpeed writes checkpoints that it loads wrongly on another number of ranks, and
    # not at all. All they give is speed.
    for key in ("round_robin_gradients", "stage3_module_granularity_threshold"):
        if zero.pop(key, None) and ranks.is_first:
            say(f"laclip: {path}: {key} is passed over: with it DeepSpeed's checkpoints are wrong")
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % ranks.world_size:
        raise ValueError(
            f"train.global_batch_size: {batch} does not divide by the {ranks.world_size} ranks; "
            f"the next that does: {-(-batch // ranks.world_size) * ranks.world_size}"
        )
    local = batch // ranks.world_size
    micro = min(micro or local, local)
    if local % micro:
        raise ValueError(
            f"train.micro_batch_size: {micro} does not divide the {local} samples of each of "
            f"the {ranks.world_size} ranks (train.global_batch_size {batch})"
        )
    values = (batch, micro, local // micro, config.optimizer.clip_norm)
    for (key, owner), value in zip(FILLED.items(), values):
        found = settings.get(key, "auto")
        if found not in ("auto", value):
            raise ValueError(
                f"{path}: {key} is {found!r}, but by {owner} of the run's TOML it is {value!r}. "
                f'Set it to "auto" in {path}'
            )
        settings[key] = value
    for key, instead in NOT_READ.items():
        if key in settings:
            raise ValueError(
                f"{path}: the section {key!r} is not read: {instead}. Remove it from {path}"
            )
    for key in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        section = settings.pop(key, {})
        enabled = section.get("enabled", "auto") if isinstance(section, dict) else section
        if enabled not in ("auto", config.train.precision == key.replace("bfloat", "bf")):
            raise ValueError(
                f"{path}: {key}.enabled is {enabled!r}, but train.precision in the run's TOML is "
                f'{config.train.precision!r}. Set it to "auto" in {path}'
            )
    for key in ("wall_clock_breakdown", "flops_profiler"):
        section = settings.get(key)
        if section.get("enabled") if isinstance(section, dict) else section:
            raise ValueError(
                f"{path}: {key}: DeepSpeed's timers fail in a step of several forward passes, as "
                "ours is. Remove it: metrics.jsonl tells time and FLOPs of every step"
            )
    settings.setdefault("steps_per_print", 10**9)
    settings["zero_allow_untested_optimizer"] = True
    # Else offload_optimizer would ask for DeepSpeed's own Adam.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    if not zero.get("stage"):
        settings["gradient_clipping"] = 0.0  # the step clips, by the norm that it takes itself
    if ranks.world_size == 1 and zero.get("stage") in (1, 2):
        # With nothing to overlap it leaves a wait for the GPU after every backward.
        zero["overlap_comm"] = False
    # DeepSpeed's own clock stops the GPU at every forward and every step; ours reads it at none.
    settings.setdefault("timers", {"throughput": {"enabled": False}})
    return settings
