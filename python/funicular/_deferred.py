"""What a block computes last is not computed again for its backward, where nothing needs the value.

A block ends, as a rule, in a product and a sum. Autograd keeps what goes into the product, and of what comes out nobody needs more
than the shape once the forward is over. So from the block's last product on tensors are made, and filled only if somebody
looks: anything but a view or a sum has everything filled first, in order and in place. ``torch.utils.checkpoint`` stops at the
same point, by an exception; here the graph is still to be made.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from funicular import _testing
from funicular._compiled import compilations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["Deferred", "last_product"]

#: Built in, so that an interruption strikes before they are called or after they have done everything.
_push, _pop = torch._C._push_on_torch_dispatch_stack, torch._C._pop_torch_dispatch_stack
_depth = torch._C._len_torch_dispatch_stack
_aten = torch.ops.aten
#: Autograd keeps nothing of their results, and what it keeps of their arguments is kept before they run.
_PRODUCTS = (_aten.mm.default, _aten.addmm.default)
_SUM = _aten.add.Tensor
_VIEWS = (_aten.t.default, _aten.transpose.int, _aten.view.default, _aten._unsafe_view.default)


def last_product(module: nn.Module) -> nn.Module | None:
    """Return the submodule that looks like a block's last product: the last one with a matrix of its own."""
    found = [m for m in module.modules() if any(p is not None and p.dim() == 2 for p in m._parameters.values())]
    return found[-1] if found else None


class Deferred(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Puts off products and sums, of one run of a block, until somebody looks at their values."""

    def __init__(self, poison: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._poison = poison
        self._waiting: list[tuple[Any, tuple[Any, ...], torch.Tensor]] = []
        self._storages: set[int] = set()
        #: whether something was filled after all
        self.filled = False

    @contextlib.contextmanager
    def after(self, module: nn.Module | None) -> Iterator[None]:
        """Begin when ``module`` is called, within the context; not at all where ``torch.compile`` was at work, which looks at modes and hooks."""
        modes = _depth()
        if module is None or compilations():
            yield
            return

        def begin(*_: Any) -> None:
            # Within a mode of somebody else that ends inside the block, this one would end in its place.
            if _depth() == modes:
                _push(self)

        hook = module.register_forward_pre_hook(begin)
        try:
            yield
        finally:
            if _depth() > modes:
                _pop(None)
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Put off what may be; before anything else, fill what waits."""
        if func in _VIEWS and (not self._waits(args[0]) or any(out is args[0] for _, _, out in self._waiting)):
            return func(*args, **(kwargs or {}))
        if not kwargs and torch.is_grad_enabled():
            # With a graph, nobody may keep them (the forward refused that); nor read them but through an operation.
            if (
                func in _PRODUCTS
                and args[-2].requires_grad | args[-1].requires_grad
                and not any(map(self._waits, args))
            ):
                size = args[-2].size(0), args[-1].size(1)
                return self._later(func, args, args[-1].new_empty(size))
            if func is _SUM and any(self._waits(a) for a in args) and _alike(*args):
                return self._later(func, args, torch.empty_like(args[0]))
        self.fill()
        return func(*args, **(kwargs or {}))

    def _waits(self, value: Any) -> bool:
        if not self._storages or not isinstance(value, torch.Tensor):
            return False
        with torch._C.DisableTorchFunctionSubclass():  # a weight takes this for a look at its address
            return value.untyped_storage()._cdata in self._storages

    def _later(self, func: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
        if self._poison:
            out.fill_(float("nan"))
        self._waiting.append((func, args, out))
        self._storages.add(out.untyped_storage()._cdata)
        return out

    def fill(self) -> None:
        """Compute everything that waits, where it is."""
        waiting, self._waiting = self._waiting, []
        self._storages.clear()
        if waiting:
            self.filled = True
            # Not an operation of the user's: no graph, and no new version.
            with torch._C._AutoDispatchBelowADInplaceOrView():
                for func, args, out in [] if _testing.broken("never_fill") else waiting:
                    func.overloadpacket.out(*args, out=out)

    def settle(self, outputs: list[torch.Tensor]) -> None:
        """Let go of what waits, if ``outputs`` are all that is left of it and nobody else has them; else fill it."""
        if any(self._held(owners, out, outputs) for owners, out in self._owned()):
            self.fill()
        self._waiting.clear()
        self._storages.clear()

    def _owned(self) -> Iterator[tuple[tuple[int, int, int], torch.Tensor]]:
        """How many hold each tensor that waits: inside torch, its memory, and the Python object."""
        for _, _, out in self._waiting:
            memory = torch._C._storage_Use_Count(out.untyped_storage()._cdata)
            yield (_use_count(out), memory, sys.getrefcount(out)), out

    def _held(self, owners: tuple[int, int, int], out: torch.Tensor, outputs: list[torch.Tensor]) -> bool:
        """Whether anybody but what waits and ``outputs`` has a tensor, or a view of it."""
        known = [*(a for _, args, _ in self._waiting for a in args if self._waits(a)), *outputs]
        storage = out.untyped_storage()._cdata
        views = [
            t for t in {id(t): t for t in known}.values() if t is not out and t.untyped_storage()._cdata == storage
        ]
        bases = sum(v._base is out for v in views)
        found = (
            owners[0] - bases,
            owners[1] - len(views),
            owners[2] - (_BASE if bases else 0) - sum(t is out for t in known),
        )
        saved = any(_use_count(v) != 1 for v in views)
        return found != _ALONE or saved or any(t._backward_hooks for t in (out, *views))


def _use_count(t: torch.Tensor) -> int:
    count: int = t._use_count()  # type: ignore[attr-defined]
    return count


def _alike(a: Any, b: Any) -> bool:
    """Whether a sum of both is another one of the same shape, type and order."""
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return both and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.is_contiguous() and b.is_contiguous()  # fmt: skip


def _calibrate() -> tuple[tuple[int, int, int], int]:
    """Find what :meth:`Deferred._owned` says of a tensor that nobody else has, and how many more have its object once it has a view."""
    deferred = Deferred(poison=False)
    deferred._waiting.append((None, (), torch.empty(1)))
    alone = next(deferred._owned())[0]
    view = deferred._waiting[0][2].view(1, 1)
    with_view = next(deferred._owned())[0]
    del view
    return alone, with_view[2] - alone[2]


_ALONE, _BASE = _calibrate()
