"""Fused contrastive losses, installed as laclip.kernels."""

if __name__ != "laclip.kernels":
    raise ImportError(
        "this folder is the package laclip.kernels, not a top-level 'kernels' (a name that "
        "Hugging Face owns). Install with 'pip install -e .' and import laclip.kernels."
    )
