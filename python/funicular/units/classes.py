"""Classes of parameters: which of them can be paged."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Unpaged", "is_dtensor", "pageable", "unpaged", "unpaged_note"]

#: what a subclass may define under a name of torch's and still be an ordinary parameter
_HARMLESS = frozenset(
    {
        "__doc__", "__module__", "__qualname__", "__dict__", "__weakref__", "__init__", "__new__", "__repr__", "__annotations__",
        "__annotate_func__", "__annotations_cache__", "__static_attributes__", "__firstlineno__", "__orig_bases__", "__parameters__",
    }
)  # fmt: skip


def pageable(p: torch.Tensor) -> bool:
    """Whether a parameter can be paged: an ``nn.Parameter``, or of a subclass that changes nothing of a tensor.

    A subclass may add attributes and methods. One that replaces something of ``torch.Tensor`` (``to``, ``detach``,
    ``__torch_function__``, ``__torch_dispatch__``, ...) may keep its values elsewhere, and one with ``__slots__`` has another layout.
    A subclass over integers is a packed format: the kernels that unpack it take its address where no hook sees it.
    """
    return type(p) is nn.Parameter or (p.dtype.is_floating_point and _plain(type(p)))


class _Between(nn.Parameter):
    """Stands for the classes that parameters have while they are offloaded: beside it in the bases of a class, another can be tried."""


@functools.cache
def _plain(cls: type) -> bool:
    """Whether a class adds to ``nn.Parameter`` and replaces nothing of it."""
    if not issubclass(cls, nn.Parameter):
        return False
    own = cls.__mro__[: cls.__mro__.index(nn.Parameter)]
    if any("__slots__" in vars(c) or (set(vars(c)) - _HARMLESS) & _tensor_names() for c in own):
        return False
    metaclass: Any = type(cls)
    try:
        metaclass("_Between", (_Between, cls), {})
    except TypeError:  # a metaclass of its own, or an order of bases that Python refuses
        return False
    return True


@functools.cache
def _tensor_names() -> frozenset[str]:
    return frozenset(dir(nn.Parameter)) | {"__torch_dispatch__", "__tensor_flatten__", "__getattr__", "__setattr__"}


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is distributed over processes; imports nothing for it."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return False
    return any(c.__name__ == "DTensor" and c.__module__.startswith("torch.distributed") for c in type(tensor).__mro__)


class Unpaged(NamedTuple):
    """A parameter that stays where it is."""

    name: str
    kind: str
    device: str
    numel: int
    bytes: int
    trained: bool


def unpaged(model: nn.Module) -> list[Unpaged]:
    """Return the parameters of a model that cannot be paged."""
    left = [(name, p) for name, p in model.named_parameters() if not _is_offloaded(p) and not pageable(p)]
    return [Unpaged(name, type(p).__name__, str(p.device), p.numel(), _bytes(p), p.requires_grad) for name, p in left]


def _is_offloaded(p: torch.Tensor) -> bool:
    """Whether a parameter is one of an offloaded model, which may be gone."""
    return "_funicular_ref" in p.__dict__


def _bytes(tensor: Any) -> int:
    """Return the bytes that a tensor takes: those of the tensors that it is made of, where it is made of others."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return int(tensor.numel() * tensor.element_size())
    return sum(_bytes(getattr(tensor, name)) for name in inner()[0])


def unpaged_note(left: Iterable[Unpaged]) -> str:
    """Describe parameters that stay where they are, in one line."""
    left = list(left)
    kinds = ", ".join(dict.fromkeys(f"{one.kind} on {one.device}" for one in left))
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    names = ", ".join(f"'{one.name}'" for one in left[:3])
    size = sum(one.bytes for one in left) / 2**20
    return f"{len(left)} parameters of {size:.1f} MiB ({kinds}): {names}{more}"
