"""Optimizers over offloaded (and ordinary) parameters."""

from funicular.optim.adamw import AdamW

__all__ = ["AdamW"]
