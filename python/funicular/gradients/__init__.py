"""Gradients: brought to their places, their norm and clipping, updates that begin in backward."""
