"""Sums of gradients over several backwards.

Autograd adds a gradient to the one that is there, in its place. In host memory that place is reached over the link, by a kernel that holds the
GPU's compute stream meanwhile, twice for a norm. So the earlier gradients of a unit are copied up beside the computations, a unit ahead; autograd
adds to the copy, and the sum goes the way of any new gradient: its norm is taken where it is, and it is copied down.

Where anything else holds a gradient or looks at its place, autograd adds in the place, as in plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from funicular._core import gradient_up, wait_up
from funicular.gradients.paged import is_held
from funicular.torch_internals.autograd import adds_to
from funicular.torch_internals.memory import storage_uses
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from funicular._core import Engine
    from funicular.gradients.adding import Backwards
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["Sums"]


class Sums:
    """The gradients of one model that are on their way up, to be added to."""

    def __init__(self, engine: Engine, backwards: Backwards, *, wanted: bool) -> None:
        self._engine, self._backwards = engine, backwards
        #: copying them up is faster than adding in their place
        self._wanted = wanted
        #: the order in which backward opened the units, the last time and this time
        self._last: list[Unit] = []
        self._order: list[Unit] = []
        #: units of this backward whose gradients were asked for
        self._asked: set[Unit] = set()

    def opened(self, unit: Unit, stream: int) -> bool:
        """Bring up what backward is about to add to: gradients of a unit, and of the one that came after it the last time.

        False if there is nothing that the end of this backward would have to let go of.
        """
        if (
            not self._wanted
            or unit in self._order
            or not any(adds_to(ref.param) for ref in unit.params if ref.trainable)
        ):
            return False
        at = len(self._order)
        self._order.append(unit)
        self._fetch(unit, stream)
        if at + 1 < len(self._last) and self._last[at] is unit:
            self._fetch(self._last[at + 1], stream)
        return True

    def _fetch(self, unit: Unit, stream: int) -> None:
        if unit in self._asked or unit.grads_on_nvme:
            return
        self._asked.add(unit)
        with unguarded():
            for ref in unit.params:
                if ref.sum is None and not self._backwards.adds_to(ref) and _is_alone(ref):
                    self._fetch_one(ref, stream)

    def _fetch_one(self, ref: PagedParam, stream: int) -> None:
        assert ref.grad is not None
        home, version = ref.home, ref.grad._version
        try:
            copy = torch.empty_strided(home.size(), home.stride(), dtype=home.dtype, device=ref.grad.device)
        except torch.cuda.OutOfMemoryError:
            return  # then it is added to in its place
        ref.fetch_sum((copy, version, None))  # before: nothing may free what is being copied
        number = gradient_up(self._engine, ref.unit.engine_id, ref.offset, copy.data_ptr(), copy.nbytes, stream)
        ref.fetch_sum((copy, version, number))

    def take(self, ref: PagedParam, stream: int) -> bool:
        """Let autograd add to the copy that was brought up; False if there is none that is still right."""
        if ref.sum is None:
            return False
        copy, version, number = ref.sum
        wait_up(self._engine, number, stream)
        ref.fetch_sum(None)
        with unguarded():
            if not _is_alone(ref) or ref.grad is None or ref.grad._version != version:
                return False
            ref.forget_norm()
            ref.param.grad = copy
        return True

    def backward_ended(self, stream: int) -> None:
        """Let go of what was brought up and not added to."""
        for unit in self._asked:
            for ref in unit.params:
                if ref.sum is not None:
                    wait_up(self._engine, ref.sum[2], stream)
                    ref.fetch_sum(None)
        self._asked.clear()
        if self._order:
            self._last, self._order = self._order, []


def _is_alone(ref: PagedParam) -> bool:
    """Whether the gradient is in its place, as it is to be added to, and nothing else holds it or looks there. Guards are off."""
    if ref.grad is None or ref.grad_storage is None or ref.param.grad is not ref.grad or ref.factor is not None:
        return False
    if is_held(ref, own=True):
        return False
    return storage_uses(ref.grad_storage) <= ref.unit.grad_idle
