"""A thread's stack of saved-tensor hooks: torch's own, and what lies on top of it.

Of ``torch._C._autograd``: ``_push_saved_tensors_default_hooks``, ``_pop_saved_tensors_default_hooks``, ``_saved_tensors_hooks_is_enabled`` and
``_top_saved_tensors_default_hooks`` (2.7). In their place: ``torch.autograd.graph.saved_tensors_hooks``, which cannot be entered and left by two
hooks of a module that an interruption may strike between.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]

__all__ = ["Pair", "allowed", "install", "pop", "push", "top"]

_autograd: Any = torch._C._autograd
#: Built in, so that an interruption strikes before they are called or after they have done everything.
push, pop = _autograd._push_saved_tensors_default_hooks, _autograd._pop_saved_tensors_default_hooks
allowed = _autograd._saved_tensors_hooks_is_enabled


class _Known(threading.local):
    """What was pushed through Python, where torch does not tell."""

    def __init__(self) -> None:
        self.pairs: list[Pair] = []


def install() -> None:
    """Have torch's own calls go through ours, where torch does not say what is on the stack."""
    _autograd._push_saved_tensors_default_hooks, _autograd._pop_saved_tensors_default_hooks = push, pop


if hasattr(_autograd, "_top_saved_tensors_default_hooks"):

    def top() -> Pair | None:
        """Return the pair on top of this thread's stack; None if it is empty."""
        found: Pair | None = _autograd._top_saved_tensors_default_hooks(True)
        return found

else:
    _known, _builtin_push, _builtin_pop = _Known(), push, pop

    def top() -> Pair | None:
        """Return the pair on top of this thread's stack; None if it is empty."""
        return _known.pairs[-1] if _known.pairs else None

    def push(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        """Push a pair, and note it."""
        _builtin_push(pack, unpack)
        _known.pairs.append((pack, unpack))

    def pop() -> None:
        """Pop a pair."""
        _builtin_pop()
        if _known.pairs:
            _known.pairs.pop()
