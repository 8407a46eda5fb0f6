"""How tensors are sent to other processes.

``torch.multiprocessing.reductions.reduce_tensor``: what sends an ordinary tensor. ``multiprocessing.reduction.ForkingPickler``, Python's own:
where torch registers what sends tensors of each class. In its place: ``__reduce_ex__`` of the class alone, which on a GPU would send a storage.
"""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from torch.multiprocessing import reductions

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["reduce_tensor", "send_by"]

#: what sends an ordinary tensor
reduce_tensor: Callable[[Any], Any] = reductions.reduce_tensor


def send_by(cls: type, how: Callable[[Any], Any]) -> None:
    """Have tensors of a class sent by a function that returns what pickle makes of one."""
    ForkingPickler.register(cls, how)
