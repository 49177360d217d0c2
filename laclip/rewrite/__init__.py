"""Caption rewriting with language models."""
