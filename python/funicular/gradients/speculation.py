"""Updates that begin during backward, for units whose plan has spare frames.

A unit's gradients are complete when all of its trained parameters have one from this backward, and this backward is the last
before the step, as the last step had it. Then the runtime begins the update that the next step will ask for, should nothing change: with
the optimizer's present hyperparameters, into frames that nobody sees. The step confirms it or makes it anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable

    from funicular.optim.states import ParamStates
    from funicular.units.unit import PagedParam, Unit
    from funicular.windows.session import Session

    Member = tuple[PagedParam, ParamStates, dict[str, Any]]
    #: from the members of a unit to its spans and their hyperparameters, as a step would ask for them
    Describe = Callable[[list[Member]], tuple[list[tuple[int, int, int, int, bool]], list[Any]]]

__all__ = ["Ahead"]


class Ahead:
    """What the last step tells of the next one."""

    def __init__(self) -> None:
        self._members: dict[int, list[Member]] = {}
        self._describe: Describe | None = None
        self._backwards = 0
        self._expected = 1

    def learn(self, units: dict[Unit, list[Member]], describe: Describe) -> None:
        """Take note of a step."""
        self._members = {unit.engine_id: members for unit, members in units.items() if unit.spare}
        self._describe = describe
        self._expected, self._backwards = max(self._backwards, 1), 0
        for unit in units:
            unit.guess = None

    def arrived(self, ref: PagedParam) -> None:
        """Take note of a gradient that is on its way to its segment."""
        unit = ref.unit
        if not unit.spare or self._backwards + 1 < self._expected:
            return
        unit.arrived.add(ref)
        if len(unit.arrived) == unit.trained:
            self._begin(unit)

    def backward_ended(self, units: list[Unit]) -> None:
        """Count the backwards between two steps."""
        self._backwards += 1
        for unit in units:
            unit.arrived.clear()

    def _begin(self, unit: Unit) -> None:
        members = self._members.get(unit.engine_id)
        if members is None or self._describe is None or len(members) != unit.trained or unit.grads_aliased():
            return
        session = unit.session
        spans, hypers = self._describe(members)
        if session.engine.update_ahead((unit.engine_id, spans, False), hypers, session.stream()):
            unit.guess = _inputs(unit)

    @staticmethod
    def confirmed(unit: Unit) -> bool:
        """Whether gradients and parameters are still those from which a unit's update was begun."""
        return unit.guess is not None and unit.guess == _inputs(unit) and not unit.grads_aliased()

    @staticmethod
    def drop(session: Session, unit: Unit) -> None:
        """Forget what was begun: somebody looks at a gradient, and may change it."""
        if unit.guess is not None:
            unit.guess = None
            session.engine.drop_ahead(unit.engine_id)


def _inputs(unit: Unit) -> list[tuple[bool, int, int]]:
    with unguarded():
        return [
            (ref.param.grad is ref.grad, ref.grad._version, ref.param._version)
            for ref in unit.params
            if ref.grad is not None
        ]
