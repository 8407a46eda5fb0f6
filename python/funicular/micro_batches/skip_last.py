"""What a block computes last is not computed again for its backward, where nothing needs the value.

A block ends, as a rule, in a product and a sum. Autograd keeps what goes into the product, and once the forward is over, only the
shape of what comes out is needed. So from the block's last product on, tensors are made without values, and filled only if their
values are asked for: any operation but a view or a sum has everything filled first, in order and in place.
``torch.utils.checkpoint`` stops at the same point, by an exception; here the graph is still to be made.

D1: what waits is filled before any operation of torch's dispatcher but those that wait themselves, and before any function of
torch's that is called from Python but those of ``_HARMLESS`` (they may read without an operation: ``tolist``, ``pickle``).
D2: a tensor that was never filled is dropped only if no other code has it: only our own aliases and the block's outputs hold
its memory, and no other code holds those.
D3: what is needed to fill is ours: aliases, which neither ``t.data = ...`` nor the end of a tensor changes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from funicular.guard.classes import WindowParameter
from funicular.torch_internals.autograd import has_backward_hooks
from funicular.torch_internals.compiling import compilations
from funicular.torch_internals.memory import number_of, tensor_uses, uses_of
from funicular.torch_internals.modes import TorchDispatchMode, depths, pop, pop_functions, push, push_functions
from funicular.torch_internals.modules import own_parameters
from funicular.torch_internals.overrides import below_autograd, without_functions

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Deferred", "last_product"]

_aten = torch.ops.aten
#: Autograd keeps nothing of their results, and what it keeps of their arguments is kept before they run.
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_SUM = _aten.add.Tensor
_VIEWS = (_aten.t.default, _aten.transpose.int, _aten.view.default, _aten._unsafe_view.default)
_T = torch.Tensor
#: Functions that read nothing but through an operation.
_HARMLESS = frozenset(
    {
        F.linear, torch.add, torch.addmm, torch.matmul, torch.mm, torch.t, _T.__add__, _T.__matmul__, _T.__radd__,
        _T.__rmatmul__, _T.add, _T.addmm, _T.dim, _T.dtype.__get__, _T.device.__get__, _T.matmul, _T.mm, _T.requires_grad.__get__,  # type: ignore[attr-defined]
        _T.reshape, _T.shape.__get__, _T.size, _T.t, _T.transpose, _T.view,  # type: ignore[attr-defined]
    }
)  # fmt: skip
_PLAIN = (torch.Tensor, nn.Parameter, WindowParameter)


def last_product(module: nn.Module) -> nn.Module | None:
    """Return the submodule that looks like a block's last product: the last one with a matrix of its own."""
    found = [m for m in module.modules() if any(p is not None and p.dim() == 2 for p in own_parameters(m).values())]
    return found[-1] if found else None


class Deferred(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts off products and sums, of one run of a block, until their values are asked for."""

    def __init__(self, poison: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._poison = poison
        #: aliases of arguments and of the result
        self._waiting: list[tuple[Any, tuple[Any, ...], torch.Tensor]] = []
        self._storages: set[int] = set()
        #: whether something was filled after all
        self.filled = False

    @contextlib.contextmanager
    def after(self, module: nn.Module | None) -> Iterator[None]:
        """Begin when ``module`` is called, within the context; not at all where ``torch.compile`` was at work, which looks at modes and hooks."""
        if module is None or compilations():
            yield
            return
        before, thread, functions = depths(), threading.get_ident(), _Functions(self)

        def begin(*_: Any) -> None:
            # Inside another mode that ends within the block, torch would end this one in its place.
            if threading.get_ident() == thread and depths() == before:
                push(self)
                push_functions(functions)

        hook = module.register_forward_pre_hook(begin)
        try:
            yield
        finally:
            operations, calls = depths()
            if calls > before[1]:
                pop_functions()
            if operations > before[0]:
                pop(None)
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Put off what may be; before anything else, fill what waits."""
        with without_functions():
            if func in _VIEWS:
                return func(*args, **(kwargs or {}))
            if not kwargs and torch.is_grad_enabled() and all(_is_plain(a) for a in args):
                # Tensors with a graph are kept by no other code: the forward refused that.
                graph = any(a.requires_grad for a in args)
                if func in _PRODUCTS and graph and not any(map(self._waits, args)):
                    size = args[-2].size(0), args[-1].size(1)
                    return self._later(func, args, args[-1].new_empty(size))
                if func is _SUM and any(map(self._waits, args)) and _alike(*args):
                    return self._later(func, args, torch.empty_like(args[0]))
            self.fill()
            return func(*args, **(kwargs or {}))

    def _waits(self, value: torch.Tensor) -> bool:
        return _memory(value) in self._storages

    def _later(self, func: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if self._poison:
            out.fill_(float("nan"))
        self._waiting.append((func, tuple(map(_aten.alias.default, args)), _aten.alias.default(out)))
        self._storages.add(_memory(out))
        return out

    def fill(self) -> None:
        """Compute everything that waits, where it is."""
        waiting, self._waiting = self._waiting, []
        self._storages.clear()
        if waiting:
            self.filled = True
            _compute(waiting)

    def settle(self, outputs: list[torch.Tensor]) -> None:
        """Drop what waits, if ``outputs`` are all that is left of it and no other code holds them; else fill it."""
        if self._held(outputs):
            self.fill()
        self._waiting.clear()
        self._storages.clear()

    def _held(self, outputs: list[torch.Tensor]) -> bool:
        """Whether any tensor besides those that wait and ``outputs`` shares their memory."""
        left = list({id(t): t for t in outputs if _is_plain(t) and self._waits(t)}.values())
        known = Counter(_memory(t) for _, args, out in self._waiting for t in (*args, out))
        known.update(map(_memory, left))
        if any(_owners_of_memory(out) != known[_memory(out)] for _, _, out in self._waiting):
            return True
        times = Counter(map(id, outputs))
        return any(_owners(left, i) != (1, _ALONE + times[id(t)]) or has_backward_hooks(t) for i, t in enumerate(left))


def _compute(waiting: list[tuple[Any, tuple[Any, ...], torch.Tensor]]) -> None:
    """Run what was put off, each into the memory of its result."""
    # Not an operation of the user's: no graph, and no new version.
    with without_functions(), below_autograd():
        for func, args, out in waiting:
            func.overloadpacket.out(*args, out=out)


class _Functions(TorchFunctionMode):
    """Sees what Python calls of torch, and has what waits filled before it."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in _HARMLESS:
            self._deferred.fill()
        return func(*args, **(kwargs or {}))


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN and value.layout is torch.strided


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a sum of both is another one of the same shape, type and order."""
    same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return same and a.is_contiguous() and b.is_contiguous()


def _memory(t: torch.Tensor) -> int:
    return number_of(t.untyped_storage())


def _owners_of_memory(t: torch.Tensor) -> int:
    """Return how many tensors share a tensor's memory."""
    count: int = uses_of(_memory(t)) - _ASKING
    return count


def _owners(tensors: list[torch.Tensor], i: int) -> tuple[int, int]:
    """Return how many hold a tensor of a list inside torch, and its Python object; a weak reference may become one."""
    weak = weakref.getweakrefcount(tensors[i])
    return tensor_uses(tensors[i]), sys.getrefcount(tensors[i]) + weak


#: What asking for it adds to the first.
_ASKING = 0
_ASKING = _owners_of_memory(torch.empty(1, device="cpu")) - 1
#: What :meth:`Deferred._held` finds of the second for a tensor that only a list holds.
_ALONE = next(_owners(ts, i)[1] for ts in ([torch.empty(1, device="cpu")],) for i, t in enumerate(ts))
