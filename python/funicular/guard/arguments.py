"""Arguments and results of operations: tensors in them replaced, gradients wanted, tensors by identity."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["collect_ids", "needs_grad", "swapped"]


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
