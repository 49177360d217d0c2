"""Preparation of datasets: pack, index, tokenize, verify, inspect."""
