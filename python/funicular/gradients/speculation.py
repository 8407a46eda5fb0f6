"""Speculative updates: they begin during backward, for units whose plan has a spare copy of their states.

A unit's gradients are complete when as many have come of each of its trained parameters as came before the last step. Then the runtime begins the update that the next step will ask for, should nothing change: with
the optimizer's present hyperparameters, into frames that nothing else reads. The step confirms it, or makes the update anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular._core import UnitUpdate
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from funicular._core import Engine, Hyper, Span
    from funicular.gradients.adding import Backwards
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

    #: returns the spans of a unit and their hyperparameters, as a step would ask for them; None if the states have been replaced
    Describe = Callable[[], tuple[list[Span], list[Hyper]] | None]

__all__ = ["Speculation"]


class Speculation:
    """What the last step tells of the next one."""

    def __init__(self, engine: Engine, backwards: Backwards) -> None:
        self._engine, self._backwards = engine, backwards
        #: by unit: all of its trained parameters were stepped
        self._next: dict[int, Describe] = {}

    def learn(self, stepped: Iterable[Unit], whole: dict[Unit, Describe]) -> None:
        """Take note of a step, and of the updates to come of units that it stepped as a whole."""
        self._next = {unit.engine_id: describe for unit, describe in whole.items()}
        for unit in stepped:
            unit.begin_from(None)
            for ref in unit.params:
                ref.end_sum()

    def arrived(self, ref: PagedParam, stream: int) -> None:
        """Take note of a gradient that is on its way to its segment."""
        ref.note_gradient()
        self.look(ref.unit, stream)

    def look(self, unit: Unit, stream: int) -> None:
        """Begin a unit's update if its gradients are all on their way to their segment."""
        if not unit.spare_copy or not unit.has_all_gradients():
            return
        describe = self._next.get(unit.engine_id)
        if describe is None or unit.grads_aliased() or self._backwards.adds_within(unit):
            return
        described = describe()
        if described is None:
            return
        spans, hypers = described
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
