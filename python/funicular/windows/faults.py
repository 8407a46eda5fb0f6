"""Weights that code touches which asks no guard: the kernels of a compiled step, and a forked child."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from funicular import _core
from funicular.errors import UsageError
from funicular.homes.edits import take_frame_edits
from funicular.windows.shutdown import living
from funicular.windows.signals import refuse

if TYPE_CHECKING:
    from funicular.units.unit import Access, Unit
    from funicular.windows.session import Session

__all__ = ["bring_in", "install"]


#: seconds that a compiled step waits for a thread to leave a unit
_PATIENCE = 60.0


def bring_in(session: Session, units: list[Unit], use: Access) -> None:
    """Make the homes of all these units valid, current and present at once, and keep them so until ``use`` is over.

    ``use`` is under way. Unit by unit it waits for the other threads inside: their kernels compute with the frames, and the window that
    they close would bring older bytes home. From then on other threads use the unit from its home.

    Raises
    ------
    UsageError
        ``FN-E118`` if another thread stays inside.
    RuntimeFailure
        ``FN-E106`` in a signal handler, amid the session's own work.
    BudgetError
        ``FN-E205`` if ``budget.host`` has no room for all that lives on NVMe.
    """
    session.alive()
    refuse(session, "a compiled step")
    for unit in units:
        until = time.monotonic() + _PATIENCE
        while not _take_home(session, unit, use):
            if time.monotonic() > until:
                raise UsageError(
                    "FN-E118",
                    f"another thread has been computing with '{unit.name}' for {_PATIENCE:.0f} s, and a compiled step edits weights at "
                    "their homes alone. Step when the forwards of other threads are over, or leave the step uncompiled.",
                )
            time.sleep(0.0005)
    with session.lock:
        session.homes.fault_in(units)


def _take_home(session: Session, unit: Unit, use: Access) -> bool:
    """Bring a unit's parameters home for ``use``; False if another thread is using them at their frames."""
    with session.lock:
        session.alive()
        if session.windows.is_used_by_others(unit):
            return False
        session.windows.close(unit)
        use.themselves.add(unit)
        use.units.add(unit)
        session.engine.settle(unit.engine_id, session.stream())
        if session.saving is not None:
            _core.preserve(session.engine, unit.engine_id)
        take_frame_edits(session.homes, unit)
        return True


def _before_fork() -> None:
    """Give the child copies of memory that tensors and arrays besides the parameters look at: it may go on using those."""
    ranges: list[tuple[int, int]] = []
    for session in list(living):
        if session.closed or session.pid != os.getpid() or session.device.type != "cpu":
            continue
        for unit in session.units:
            if unit.home_aliased() and (unit.shadow_filled or not unit.on_nvme):
                ranges.extend((ref.home_address, ref.numel * ref.home.element_size()) for ref in unit.params)
    _core.keep_for_child(ranges)


def _after_fork_in_child() -> None:
    """Make every use of a parameter ask the guard, which refuses it: open windows are the parent's."""
    for session in list(living):
        for unit in session.units:
            unit.inside.clear()


def install() -> None:
    """Have the process prepare for each fork."""
    os.register_at_fork(before=_before_fork, after_in_parent=_core.forked, after_in_child=_after_fork_in_child)
