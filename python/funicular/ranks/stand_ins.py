"""Tensors that stand for the gradient in its place, on one rank alone: zeros, and copies that are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from funicular.guard.classes import GuardedGrad
from funicular.units.param import link

if TYPE_CHECKING:
    from funicular.units.param import PagedParam

__all__ = ["guard", "let_go", "zeros_of"]


def let_go(ref: PagedParam) -> None:
    """Make a copy that was shown an ordinary tensor, for those who hold it."""
    shown = ref.shown
    if shown is not None:
        shown.__class__ = torch.Tensor
        del shown._funicular_ref  # type: ignore[attr-defined]
        ref.show(None)


def zeros_of(ref: PagedParam) -> torch.Tensor:
    """Return a gradient of zeros, guarded as one in its place is, that takes no memory."""
    zeros = torch.zeros((), dtype=ref.home.dtype, device=ref.home.device).expand(ref.home.shape)
    guard(zeros, ref)
    return zeros


def guard(grad: torch.Tensor, ref: PagedParam) -> None:
    """Have edits of a gradient noticed that is this rank's alone."""
    grad.__class__ = GuardedGrad
    link(grad, ref)
