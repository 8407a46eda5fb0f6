"""Speculative updates: they begin during backward, for units whose plan has a spare copy of their states.

A unit's gradients are complete when all of its trained parameters have one from this backward, and this backward is the last
before the step, as the last step had it. Then the runtime begins the update that the next step will ask for, should nothing change: with
the optimizer's present hyperparameters, into frames that nothing else reads. The step confirms it, or makes the update anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular._core import UnitUpdate
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from funicular._core import Engine, Hyper, Span
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

    #: returns the spans of a unit and their hyperparameters, as a step would ask for them
    Describe = Callable[[], tuple[list[Span], list[Hyper]]]

__all__ = ["Speculation"]


class Speculation:
    """What the last step tells of the next one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: by unit: all of its trained parameters were stepped
        self._next: dict[int, Describe] = {}
        self._backwards = 0
        self._expected = 1

    def learn(self, stepped: Iterable[Unit], whole: dict[Unit, Describe]) -> None:
        """Take note of a step, and of the updates to come of units that it stepped as a whole."""
        self._next = {unit.engine_id: describe for unit, describe in whole.items()}
        self._expected, self._backwards = max(self._backwards, 1), 0
        for unit in stepped:
            unit.begin_from(None)

    def arrived(self, ref: PagedParam, stream: int) -> None:
        """Take note of a gradient that is on its way to its segment."""
        unit = ref.unit
        if not unit.spare_copy or self._backwards + 1 < self._expected:
            return
        unit.arrived.add(ref)
        if len(unit.arrived) == unit.trained:
            self._begin(unit, stream)

    def backward_ended(self, units: list[Unit]) -> None:
        """Count the backwards between two steps."""
        self._backwards += 1
        for unit in units:
            unit.arrived.clear()

    def _begin(self, unit: Unit, stream: int) -> None:
        describe = self._next.get(unit.engine_id)
        if describe is None or unit.grads_aliased():
            return
        spans, hypers = describe()
        if self._engine.speculate(UnitUpdate(unit.engine_id, spans, untouched=False), hypers, stream):
            unit.begin_from(_inputs(unit))

    @staticmethod
    def confirmed(unit: Unit) -> bool:
        """Whether gradients and parameters are still those from which a unit's update was begun."""
        return unit.begun_from is not None and unit.begun_from == _inputs(unit) and not unit.grads_aliased()

    def drop(self, unit: Unit) -> None:
        """Forget an update that was begun: its gradients are looked at, and may change."""
        if unit.begun_from is not None:
            unit.begin_from(None)
            self._engine.drop_speculation(unit.engine_id)


def _inputs(unit: Unit) -> list[tuple[bool, int, int]]:
    with unguarded():
        return [
            (ref.param.grad is ref.grad, ref.grad._version, ref.param._version)
            for ref in unit.params
            if ref.grad is not None
        ]
