"""laclip: a fast and exact trainer for CLIP with language rewrites."""

__version__ = "0.1.0"
