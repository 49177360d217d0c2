"""Models for the package transformers, from a folder on disk or a .gguf file."""

from pathlib import Path
from typing import Any

import torch


def load_model(path: str | Path, kind: str, option: str) -> tuple[Any, Any]:
    """(tokenizer, model) from a folder or a .gguf file, on the GPU where there is one.

    kind: the class of transformers that reads it, such as AutoModelForCausalLM; bf16 on a GPU, but
    fp32 for AutoModel, whose features are compared. option: of the command line, for the errors.
    Raises ValueError where the package is missing or the files are no such model.
    """
    try:
        import transformers
    except ModuleNotFoundError:
        raise ValueError(
            f"{option} needs the package transformers. Run: pip install 'laclip[rewrite]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()  # they would break the run's own line
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{option} {path}: no such folder or .gguf file")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = device.type == "cuda" and kind != "AutoModel"
    place: dict[str, Any] = {"local_files_only": True}
    weights: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32}
    if path.suffix == ".gguf":
        place["gguf_file"] = path.name
        if hasattr(transformers, "GgufConfig"):  # earlier releases unpack the weights anyway
            weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    folder = str(path.parent if path.suffix == ".gguf" else path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **place)
        model = getattr(transformers, kind).from_pretrained(folder, **place, **weights)
    except (ImportError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{option} {path}: transformers cannot read it: {said}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, model.to(device).eval()
