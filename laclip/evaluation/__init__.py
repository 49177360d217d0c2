"""Scores of a model: on held-out sets while it trains, and by the protocols of the field."""
