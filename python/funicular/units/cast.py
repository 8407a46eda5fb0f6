"""Parameters in the number format that a policy asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from funicular.units.classes import pageable
from funicular.units.dtypes import BY_NAME, TRAINED

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Cast"]


class Cast:
    """Conversion of a model's floating-point parameters, and of their gradients; buffers keep their format.

    Parameters
    ----------
    word : str
        ``params.dtype`` of a policy.
    """

    def __init__(self, word: str) -> None:
        self._dtype = BY_NAME.get(word)
        self._before: list[tuple[nn.Parameter, torch.dtype]] = []

    def dtype_of(self, p: torch.Tensor) -> torch.dtype:
        """Return the format that a parameter has, or will have."""
        converted = self._dtype is not None and p.dtype in TRAINED and pageable(p)
        return self._dtype if self._dtype is not None and converted else p.dtype

    def apply(self, model: nn.Module) -> None:
        """Convert, one parameter after the other."""
        for p in model.parameters():
            dtype = self.dtype_of(p)
            if dtype != p.dtype:
                self._before.append((p, p.dtype))
                _convert(p, dtype)

    def undo(self) -> None:
        """Give every parameter its format back; what was rounded stays so."""
        for p, dtype in self._before:
            if p.dtype != dtype:
                _convert(p, dtype)
        self._before.clear()


def _convert(p: nn.Parameter, dtype: torch.dtype) -> None:
    with torch.no_grad():
        data = p.data.to(dtype)
        grad = None if p.grad is None else p.grad.to(dtype)
        # Nothing is called in between: an interruption finds all of it or nothing.
        p.grad = None
        p.data = data
        p.grad = grad
