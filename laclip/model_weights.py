"""Weights into a model: from a file that a run begins with, or from a run's own."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from laclip.convert import read_checkpoint

if TYPE_CHECKING:
    from laclip.config import ModelConfig


def load_weights(model: nn.Module, path: str | Path) -> list[str]:
    """Loads a state dict of this model, written by torch.save, plain or under "state_dict".

    A part of the model (image, image.projection, text, logit_scale, logit_bias) of which the file
    holds nothing stays as it is; returns the names of these. A file without any tower is refused.
    Raises FileNotFoundError, and ValueError that names missing, extra and misshapen entries.
    """
    found = read_checkpoint(path, "model.weights")
    held = {name.partition(".")[0] for name in found}
    parts = {name.partition(".")[0] for name in model.state_dict()}
    left = parts - held if held <= parts and held & {"image", "text"} else set()
    if "image" in held and "image.projection.weight" not in found:
        left.add("image.projection")
    kept = {n: t for n, t in model.state_dict().items() if n.startswith(tuple(left))}
    load_state(model, kept | found, str(path))
    return sorted(left)


def check_locks(config: "ModelConfig", fresh: list[str]) -> None:
    """Raises ValueError where a locked tower would stay as random as it begins.

    fresh: what load_weights found nothing of.
    """
    for tower, locked in (("image", config.lock_image), ("text", config.lock_text)):
        if locked and (not config.weights or tower in fresh):
            found = f"'{config.weights}' holds nothing of" if config.weights else "nothing gives"
            raise ValueError(
                f"model.lock_{tower}: {found} the {tower} tower, which would stay random. Set "
                f"model.weights to a file that holds it, or model.lock_{tower} = false"
            )


def load_state(model: nn.Module, found: dict[str, Tensor], source: str) -> None:
    """Loads a state dict of this model; source: where it is from, for the ValueError's words."""
    expected = model.state_dict()
    problems = [
        *_listing("missing", expected.keys() - found.keys()),
        *_listing("not in this model", found.keys() - expected.keys()),
        *_listing(
            "of another shape",
            (
                f"{name} {list(found[name].shape)}, expected {list(expected[name].shape)}"
                for name in expected.keys() & found.keys()
                if found[name].shape != expected[name].shape
            ),
        ),
    ]
    if problems:
        raise ValueError(
            f"model.weights: {source} does not hold this model's weights: {'; '.join(problems)}. "
            "Set the model's section to the file's architecture; weights of open_clip, "
            "Hugging Face or LaCLIP's release go through: laclip import"
        )
    model.load_state_dict(found)


def _listing(what: str, names: Iterable[str]) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{what}: {', '.join(names[:5])}{more}"]
