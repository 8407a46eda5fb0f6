"""Operations of torch without a public name, and what an operation says of itself.

``torch._foreach_norm``, ``torch._foreach_mul_``: what ``clip_grad_norm_`` calls. In their place: what it calls then.

``torch._foreach_copy_``: many copies in one launch. In its place a copy each.

``torch._foreach_zero_``, ``torch._amp_foreach_non_finite_check_and_unscale_``: what ``zero_grad`` and ``GradScaler`` call. Without them gradients that
live on NVMe have to fit into memory all at once there, or are refused.

``torch._has_compatible_shallow_copy_type``: what ``Module.to`` asks before it moves a parameter. In its place: what it asks then.

``torch._neg_view``: in its place ``torch.neg``, which copies.

``torch._ops.OpOverload``, ``OpOverloadPacket`` and their ``_schema``: which arguments an operation writes to. In their place: the names of
functions, which end in ``_`` where they write.

``_is_param``: the attribute by which ``isinstance`` finds that a tensor is a parameter. In its place nothing: classes below ``nn.Parameter`` are.

Attributes of ``Tensor`` with private names: those that torch lacks are left out.

``_foreach_supported_types`` of ``torch.utils._foreach_utils`` and of ``torch.optim.optimizer``: for which classes torch takes its foreach paths.
Without it those paths are not taken for guarded tensors, and norms have other last bits.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._foreach_utils

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "EDITING_EACH",
    "FOREACH_COPY",
    "FOREACH_MUL",
    "FOREACH_NORM",
    "IS_PARAM",
    "MAY_BECOME",
    "PARAMETER_KIND",
    "SAYING_NOTHING",
    "TYPED_STORAGE",
    "USE_COUNT",
    "ZEROING",
    "known_to_foreach",
    "neg_view",
    "schemas_of",
]

_T: Any = torch.Tensor
FOREACH_NORM: Any = torch._foreach_norm
FOREACH_MUL: Any = torch._foreach_mul_
FOREACH_COPY: Any = torch._foreach_copy_
#: what ``zero_grad`` calls where gradients are to stay tensors
ZEROING: frozenset[Any] = frozenset([_T.zero_, torch._foreach_zero_])
#: what edits each tensor of a list by itself
EDITING_EACH: tuple[Any, ...] = (
    FOREACH_MUL,
    torch._foreach_zero_,
    torch._amp_foreach_non_finite_check_and_unscale_,
)
#: what ``Module.to`` asks of a parameter and of what it would make of it
MAY_BECOME: Any = torch._has_compatible_shallow_copy_type
neg_view: Any = torch._neg_view
#: what a class of parameters says when it is asked whether one is a parameter. In torch 2.4 one that says so is an instance of every class
#: of parameters, as of ``UninitializedParameter``; ``nn.Parameter`` takes one of a class below itself without
_marked: Any = torch.empty(0, device="cpu")
_marked._is_param = True
IS_PARAM: bool = not isinstance(_marked, torch.nn.UninitializedParameter)


class _Kind(type(torch.nn.Parameter)):  # type: ignore[misc]
    # whose classes have no instances but their own
    __instancecheck__ = type.__instancecheck__


#: the class of a class of parameters
PARAMETER_KIND: Any = type(torch.nn.Parameter) if IS_PARAM else _Kind
#: the method that ``torch.utils.swap_tensors`` asks before it exchanges two tensors
USE_COUNT = "_use_count"
#: the method that gives a storage with a type, which torch 2.4 has and a later one may not
TYPED_STORAGE = "_typed_storage"

_GETTERS = ("_version", "_backward_hooks", "_post_accumulate_grad_hooks", "_base")
#: attributes that say nothing about values: their getters and setters
SAYING_NOTHING: frozenset[Any] = frozenset(
    [
        *(getattr(_T, name).__get__ for name in _GETTERS if hasattr(_T, name)),
        _T._backward_hooks.__set__,
        _T._post_accumulate_grad_hooks.__set__,
    ]
)


def schemas_of(func: Any) -> list[Any] | None:
    """Return the schemas of an operation of torch's dispatcher; None for another function."""
    if isinstance(func, torch._ops.OpOverloadPacket):
        return [getattr(func, name)._schema for name in func.overloads()]  # type: ignore[no-untyped-call]
    return [func._schema] if isinstance(func, torch._ops.OpOverload) else None


def known_to_foreach(classes: Iterable[type]) -> None:
    """Let torch take its foreach paths for some classes: norms and steps of its optimizers have the bits of ordinary tensors."""
    for name in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
        known = getattr(sys.modules.get(name), "_foreach_supported_types", None)
        if isinstance(known, list):
            known.extend(cls for cls in classes if cls not in known)
