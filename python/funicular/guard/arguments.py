"""Arguments and results of operations: tensors in them replaced, gradients wanted, tensors by identity, edits refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funicular.guard.torch_functions import edits
from funicular.homes.edits import edit_of_shared

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["collect_ids", "needs_grad", "refuse_edit", "swapped"]


def swapped(item: Any, swap: dict[int, Any]) -> Any:
    """Return an argument or a result with some tensors replaced by others."""
    if isinstance(item, torch.Tensor):
        return swap.get(id(item), item)
    if type(item) in (list, tuple):
        return type(item)(swapped(i, swap) for i in item)
    if type(item) is dict:
        return {key: swapped(value, swap) for key, value in item.items()}
    return item


def needs_grad(result: Any) -> bool:
    """Whether a result has a graph."""
    if isinstance(result, (list, tuple)):
        return any(needs_grad(item) for item in result)
    return isinstance(result, torch.Tensor) and result.grad_fn is not None


def collect_ids(item: Any, found: set[int]) -> None:
    """Add the identities of what nested lists hold."""
    if isinstance(item, (list, tuple)):
        for i in item:
            collect_ids(i, found)
    else:
        found.add(id(item))


def refuse_edit(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], names: dict[int, str]) -> None:
    """Refuse an edit of what is the same memory for several processes.

    Raises
    ------
    UsageError
        ``FN-E722``, before anything is changed.
    """
    stored = edits(func, args, kwargs)
    if stored:
        flat: set[int] = set()
        collect_ids(stored, flat)
        for tensor, name in names.items():
            if tensor in flat:
                raise edit_of_shared(name)
