"""A thread's stack of saved-tensor hooks: torch's own, and what lies on top of it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

__all__ = ["Pair", "allowed", "pop", "push", "top"]

_autograd: Any = torch._C._autograd
#: Built in, so that an interruption strikes before they are called or after they have done everything.
push, pop = _autograd._push_saved_tensors_default_hooks, _autograd._pop_saved_tensors_default_hooks
allowed = _autograd._saved_tensors_hooks_is_enabled


class _Known(threading.local):
    """What was pushed through Python, where torch does not tell."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []


def _keep_books() -> Callable[[], Pair | None]:
    """Have torch's own calls go through ours, since torch 2.6 and older do not say what is on the stack."""
    known, builtin_push, builtin_pop = _Known(), push, pop

    def tracked_push(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        builtin_push(pack, unpack)
        known.pairs.append((pack, unpack))

    def tracked_pop() -> None:
        builtin_pop()
        if known.pairs:
            known.pairs.pop()

    _autograd._push_saved_tensors_default_hooks, _autograd._pop_saved_tensors_default_hooks = tracked_push, tracked_pop
    return lambda: known.pairs[-1] if known.pairs else None


if hasattr(_autograd, "_top_saved_tensors_default_hooks"):

    def top() -> Pair | None:
        """Return the pair on top of this thread's stack; None if it is empty."""
        found: Pair | None = _autograd._top_saved_tensors_default_hooks(True)
        return found

else:
    top = _keep_books()
    push, pop = _autograd._push_saved_tensors_default_hooks, _autograd._pop_saved_tensors_default_hooks
