"""What of a block's call is cut along the batch, what is shared by all slices, and how outputs are joined again.

The rule: the first tensor argument gives the batch, the size of its dimension 0. Tensors of that size are cut, tensors
whose dimension 0 is 1, scalars and rows of integers as long as the sequence are shared, and so is plain data. Everything else
is refused by name.
"""

from __future__ import annotations

import enum
import inspect
import types
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from funicular.errors import UsageError
from funicular.torch_internals import trees as pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Call", "Outputs", "arrange"]

_OFF = 'or set activations.micro_batch = "off".'
#: What says the same to every slice and keeps nothing of it.
_PLAIN = (
    types.NoneType, bool, int, float, complex, str, bytes, enum.Enum, slice, range, type, torch.dtype, torch.device,
    torch.layout, torch.memory_format, types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial,
)  # fmt: skip


class _Slot(NamedTuple):
    """Stands for a tensor in a tree of arguments."""

    at: int


class _Given(NamedTuple):
    """An output that is one of the arguments."""

    at: int


class Call(NamedTuple):
    """The arguments of one call of a block."""

    name: str
    spec: pytree.TreeSpec
    #: plain data, and a slot for each tensor
    leaves: list[Any]
    #: each tensor once
    tensors: list[torch.Tensor]
    #: which of them are cut
    cut: list[bool]
    batch: int
    #: rows of each slice
    bounds: list[tuple[int, int]]

    def arguments(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the call's arguments over other tensors, such as a slice's."""
        leaves = [tensors[leaf.at] if isinstance(leaf, _Slot) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def slice(self, start: int, stop: int) -> list[torch.Tensor]:
        """Return each tensor's part for some rows; what is shared is the tensor itself."""
        if stop - start == self.batch:
            return self.tensors
        return [t.narrow(0, start, stop - start) if cut else t for t, cut in zip(self.tensors, self.cut, strict=True)]


def arrange(
    name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int
) -> Call | None:
    """Take a call apart; None for an empty batch.

    Raises
    ------
    UsageError
        ``FN-E120`` naming the argument that is neither the batch's nor shared by all of it.
    """
    found, spec = pytree.tree_flatten((args, dict(kwargs)), is_leaf=_is_leaf)
    tensors: list[torch.Tensor] = []
    index: dict[int, int] = {}
    leaves: list[Any] = []
    for at, leaf in enumerate(found):
        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in index:
                index[id(leaf)] = len(tensors)
                tensors.append(leaf)
            leaves.append(_Slot(index[id(leaf)]))
        elif isinstance(leaf, _PLAIN):
            leaves.append(leaf)
        else:
            raise UsageError("FN-E120", _keeps_state(name, _argument(forward, args, kwargs, at), leaf))
    if not tensors or tensors[0].dim() == 0:
        what = "its first tensor argument is a scalar" if tensors else "it takes no tensor"
        raise UsageError("FN-E120", f"the block '{name}' cannot run in micro-batches: {what}, so there is no batch. "
                         f"Pass the hidden states first, {_OFF}")  # fmt: skip
    batch = int(tensors[0].size(0))
    if batch == 0:
        return None
    bounds = [(start, min(start + rows, batch)) for start in range(0, batch, rows)]
    cut = [True] * len(tensors)
    if len(bounds) > 1:
        for i, t in enumerate(tensors):
            problem = _problem(t, tensors[0])
            if problem:
                at = next(k for k, leaf in enumerate(leaves) if isinstance(leaf, _Slot) and leaf.at == i)
                raise UsageError("FN-E120", _neither(name, _argument(forward, args, kwargs, at), t, batch, problem))
            cut[i] = t.dim() > 0 and t.size(0) == batch
    return Call(name, spec, leaves, tensors, cut, batch, bounds)


def _is_leaf(value: Any) -> bool:
    # Other containers, such as caches of keys, may be changed by the block.
    return not isinstance(value, (tuple, list, dict))


def _problem(t: torch.Tensor, first: torch.Tensor) -> str:
    """Say why a tensor is neither cut nor shared; empty if it is one of them."""
    batch = first.size(0)
    if t.layout != torch.strided or t.is_nested:
        return "it is not a dense tensor. Pass dense tensors"
    if t.dim() == 0 or t.size(0) == 1:
        return ""
    if t.dim() == 1 and first.dim() > 1 and batch != t.size(0) == first.size(1) and not t.is_floating_point():
        return ""  # a position for each token, the same in every row
    if t.size(0) != batch:
        return f"its first dimension is neither the batch, {batch}, nor 1. If it is the same for every row, pass it with a leading dimension of 1 (.unsqueeze(0))"
    if t is not first and first.dim() > 2 and batch == first.size(1) and t.dim() <= 3:
        return f"the batch and the sequence are both {batch} long, so it cannot be told which of them its first dimension is. Use another batch size"
    return ""


def _argument(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int) -> str:
    """Name the argument that holds leaf ``at``."""
    paths, _ = pytree.tree_flatten_with_path((args, dict(kwargs)), is_leaf=_is_leaf)
    path: Any = paths[at][0]
    inside = pytree.keystr(path[2:])
    if path[0].idx == 1:
        return f"'{path[1].key}'{inside}"
    try:
        names = [
            p.name
            for p in inspect.signature(forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        return f"'{names[path[1].idx]}'{inside}"
    except (ValueError, TypeError, IndexError):
        return f"number {path[1].idx}{inside}"


def _neither(name: str, argument: str, t: torch.Tensor, batch: int, problem: str) -> str:
    return (
        f"the block '{name}' cannot run in micro-batches: its argument {argument} has shape {tuple(t.shape)}, and "
        f"{problem}, {_OFF}"
    )


def _keeps_state(name: str, argument: str, value: Any) -> str:
    kind = type(value).__name__
    cache = "cache" in kind.lower()
    what = "Pass use_cache=False (or set model.config.use_cache = False)," if cache else "Pass tensors and plain data,"
    return (
        f"the block '{name}' cannot run in micro-batches: its argument {argument} is a {kind}, which may hold something of "
        f"every row, and every slice would use and change it again. {what} {_OFF}"
    )


class Outputs:
    """A block's outputs, put together from those of its slices."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._spec: pytree.TreeSpec | None = None
        self._leaves: list[Any] = []
        #: what autograd sees as outputs of the block
        self.tensors: list[torch.Tensor] = []
        self.shapes: list[tuple[int, ...]] = []
        self.differentiable: list[bool] = []
        self._single = len(call.bounds) == 1

    def add(self, bounds: tuple[int, int], given: list[torch.Tensor], result: Any) -> None:
        """Take a slice's result.

        Raises
        ------
        UsageError
            ``FN-E120`` naming an output that does not have the slice's rows.
        """
        leaves, spec = pytree.tree_flatten(result)
        if self._spec is None:
            self._spec = spec
            self._leaves = [self._first(i, leaf, bounds, given) for i, leaf in enumerate(leaves)]
            return
        if spec != self._spec:
            raise UsageError("FN-E120", self._refusal("its outputs have another structure in each slice", "Return the same from every call"))  # fmt: skip
        for i, (mine, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            self._more(i, mine, leaf, bounds, given)

    def _first(self, i: int, leaf: Any, bounds: tuple[int, int], given: list[torch.Tensor]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            if not isinstance(leaf, _PLAIN):
                raise UsageError("FN-E120", self._refusal(f"its output {i} is a {type(leaf).__name__}", "Return tensors and plain data"))  # fmt: skip
            return leaf
        at = next((k for k, t in enumerate(given) if t is leaf), None)
        if at is not None:
            return _Given(at)
        start, stop = bounds
        if self._single:
            own = not isinstance(leaf, torch.nn.Parameter) and not _lies_in(leaf, given)
            return self._slot(leaf.detach() if own else leaf.detach().clone(), leaf)
        # A slice of one row cannot be told from a value that is one for all rows.
        if leaf.dim() == 0 or leaf.size(0) != stop - start or (leaf.dim() == 1 and stop - start == 1):
            raise UsageError("FN-E120", self._refusal(
                f"its output {i} has shape {tuple(leaf.shape)} for a slice of {stop - start} rows",
                "Return tensors whose first dimension is the batch",
            ))  # fmt: skip
        whole = leaf.new_empty((self._call.batch, *leaf.shape[1:]))
        whole.narrow(0, start, stop - start).copy_(leaf)
        return self._slot(whole, leaf)

    def _slot(self, tensor: torch.Tensor, leaf: torch.Tensor) -> _Slot:
        self.tensors.append(tensor)
        self.shapes.append(tuple(tensor.shape))
        self.differentiable.append(leaf.requires_grad)
        return _Slot(len(self.tensors) - 1)

    def _more(self, i: int, mine: Any, leaf: Any, bounds: tuple[int, int], given: list[torch.Tensor]) -> None:
        start, stop = bounds
        if isinstance(mine, _Given):
            if leaf is given[mine.at]:
                return
        elif isinstance(mine, _Slot):
            whole = self.tensors[mine.at]
            if isinstance(leaf, torch.Tensor) and leaf.shape == (stop - start, *whole.shape[1:]) and leaf.dtype == whole.dtype:  # fmt: skip
                whole.narrow(0, start, stop - start).copy_(leaf)
                return
        elif not isinstance(leaf, torch.Tensor) and type(leaf) is type(mine) and leaf == mine:
            return
        raise UsageError("FN-E120", self._refusal(f"its output {i} differs between slices in more than its rows", "Return tensors whose first dimension is the batch"))  # fmt: skip

    def _refusal(self, problem: str, action: str) -> str:
        return f"the block '{self._call.name}' cannot run in micro-batches: {problem}. {action}, {_OFF}"

    def check(self, result: Any, rows: int) -> list[torch.Tensor]:
        """Return the tensors of a recomputed slice that stand for :attr:`tensors`, in order.

        Raises
        ------
        UsageError
            ``FN-E121`` if the recomputation made something else.
        """
        leaves, spec = pytree.tree_flatten(result)
        again: list[torch.Tensor] = []
        if spec == self._spec:
            for mine, leaf in zip(self._leaves, leaves, strict=True):
                if not isinstance(mine, _Slot):
                    continue
                whole = self.shapes[mine.at]
                shape = whole if self._single else (rows, *whole[1:])
                if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) == shape:
                    again.append(leaf)
        if len(again) != len(self.shapes):
            raise UsageError("FN-E121", self._refusal(
                "it made other outputs when it was run again for its backward",
                "What a block makes must depend on its arguments, its weights and torch's random numbers only",
            ))  # fmt: skip
        return again

    def close(self, outer: list[torch.Tensor], joined: tuple[torch.Tensor, ...]) -> Any:
        """Return the block's result, over the tensors that autograd returned and the caller's own arguments."""
        assert self._spec is not None
        self.tensors = []  # they live no longer than their users
        leaves = [
            joined[leaf.at] if isinstance(leaf, _Slot) else outer[leaf.at] if isinstance(leaf, _Given) else leaf
            for leaf in self._leaves
        ]
        return pytree.tree_unflatten(leaves, self._spec)


def _lies_in(leaf: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether an output is a view of an argument."""
    address = leaf.untyped_storage().data_ptr()
    return any(t.untyped_storage().data_ptr() == address for t in given)
