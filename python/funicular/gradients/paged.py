"""Gradients that live on NVMe: brought to memory for those who look at them, stored again where the memory is needed.

While a unit's gradients are in memory, that memory is where they are: edits need not be noticed, and an update reads them there. What has to
be known is only who may look at that memory when it is given back.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

import torch

from funicular._core import (
    bring_gradients,
    expect_gradients,
    flush_gradients,
    give_gradients,
    gradients_in_memory,
    lift_gradient,
)
from funicular.errors import BudgetError
from funicular.torch_internals.overrides import unguarded
from funicular.units.unit import GRADIENTS_UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from funicular._core import Engine
    from funicular.gradients.adding import Backwards
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["PagedGradients", "is_held", "others_wanted"]


class PagedGradients:
    """The gradients of one model's units, of those that live on NVMe."""

    def __init__(self, engine: Engine, backwards: Backwards) -> None:
        self._engine = engine
        self._backwards = backwards
        self._units: dict[int, Unit] = {}
        #: by unit: the one that backward passes next
        self._before: dict[Unit, Unit] = {}
        #: whose gradients stay in memory while others are brought
        self._keep: set[Unit] = set()

    def know(self, units: Iterable[Unit]) -> None:
        """Take note of the units."""
        paged = [unit for unit in units if unit.grads_on_nvme]
        self._units = {unit.engine_id: unit for unit in paged}
        self._before = dict(zip(paged[1:], paged, strict=False))

    def __bool__(self) -> bool:
        return bool(self._units)

    def bring(self, unit: Unit, stream: int, *, keep: set[Unit]) -> None:
        """Bring a unit's gradients to memory; what was read earlier makes room, but not gradients of ``keep``."""
        try:
            bring_gradients(self._engine, unit.engine_id, stream)
        except BudgetError:
            self._keep = keep
            try:
                unit.owner.drop_unused()
            finally:
                self._keep = set()
            bring_gradients(self._engine, unit.engine_id, stream)

    def lift(self, ref: PagedParam, stream: int) -> bool:
        """Make a parameter's gradient an ordinary tensor on the device, to which autograd adds: it arrives again as a new one does.

        False where that is not the same to everyone: something else looks at the gradient, or it is in memory already.
        """
        unit = ref.unit
        if not unit.grads_on_nvme or is_held(ref, own=True) or unit.grads_aliased():
            return False
        sums = torch.empty_like(ref.frame)
        if not lift_gradient(self._engine, unit.engine_id, ref.offset, sums.data_ptr(), sums.nbytes, stream):
            return False
        with torch.no_grad(), unguarded():
            if ref.param.grad is not ref.grad:
                return False  # another thread, or a signal handler, cleared it during a wait
            if ref.factor is not None:
                sums.mul_(ref.factor)
            ref.forget_norm()
            ref.param.grad = sums
        self._expect_the_next(unit)
        return True

    def _expect_the_next(self, unit: Unit) -> None:
        """Have gradients read that this backward will add to next: those of the unit before."""
        before = self._before.get(unit)
        if before is None or self._backwards.adds_within(before):
            return
        if all(ref.grad is None or _is_wanted(ref) for ref in before.params):
            expect_gradients(self._engine, before.engine_id)

    def flush(self) -> None:
        """Have all gradients of a backward written."""
        if self._units:
            flush_gradients(self._engine)

    def make_room(self, stream: int) -> None:
        """Give back the memory of gradients that nothing looks at any more."""
        if not self._units:
            return
        looked_at = {unit for use in list(GRADIENTS_UNDER_WAY) for unit in use.units}
        for engine_id in gradients_in_memory(self._engine):
            unit = self._units[engine_id]
            if unit in self._keep or unit in looked_at or unit.grads_aliased() or self._backwards.adds_within(unit):
                continue
            give_gradients(self._engine, engine_id, any(map(_is_wanted, unit.params)), stream)


def others_wanted(ref: PagedParam, backwards: Backwards) -> bool:
    """Whether any other gradient of a parameter's unit has to stay as it is while this one's is brought to its place."""
    others = (other for other in ref.unit.params if other is not ref)
    # What is about to be added to may not be asked for.
    return any(backwards.adds_to(other) or _is_wanted(other) for other in others) or ref.unit.grads_aliased()


def _is_wanted(ref: PagedParam) -> bool:
    """Whether the bytes in a gradient's place are the parameter's gradient, or anything else looks at them."""
    if ref.grad is None:
        return False
    with unguarded():
        return ref.param.grad is ref.grad or is_held(ref, own=False)


class _Sample(threading.local):
    """Tensors as those over gradients' places are held: torch counts a reference more or less where it holds one itself.

    Each thread has its own, since another thread's reference would count.
    """

    def __init__(self) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(1, device="cpu"))
        #: one that is the parameter's gradient, and one that is not
        self.grad, self.other = torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu")
        self.parameter.grad = self.grad


_sample = _Sample()


def is_held(ref: PagedParam, *, own: bool) -> bool:
    """Whether anything holds the tensor over a gradient's place, or a view of it, besides the runtime and, if ``own``, its parameter."""
    # Both are counted as attributes: an argument would have a reference more, or two, by version of Python.
    new = sys.getrefcount(_sample.grad) if own else sys.getrefcount(_sample.other)
    return sys.getrefcount(ref.grad) > new or any(view() is not None for view in ref.views)
