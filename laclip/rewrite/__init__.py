"""Rewrites of captions: by a language model, and by the baselines of the paper."""
