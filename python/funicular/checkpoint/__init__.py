"""Checkpoints of a model and its optimizer: safetensors files and a manifest, written and read beside training."""

from funicular.checkpoint.save_load import Loaded, SaveHandle, load, save

__all__ = ["Loaded", "SaveHandle", "load", "save"]
