"""Weights on NVMe that code past torch's dispatcher touched, and what a forked child may go on with.

The core brings such weights when they are touched (src/memory/fault.rs). Here the session learns of it: from then on the unit is one that
somebody has read, and its bytes are compared with what was brought, so that edits through that memory count.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from funicular import _core
from funicular.errors import BudgetError
from funicular.homes.digests import look_at_home
from funicular.homes.edits import take_frame_edits
from funicular.windows.shutdown import living

if TYPE_CHECKING:
    from collections.abc import Iterable

    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["adopt", "bring_in", "fetch", "install"]


def adopt(session: Session, units: Iterable[Unit]) -> None:
    """Take note of units whose weights were brought because something touched them."""
    for unit in units:
        if unit.on_nvme and not unit.shadow_filled:
            brought = session.engine.adopt_fault(unit.engine_id)
            if brought is not None:
                unit.shadow_filled, unit.home_seen = True, brought


def fetch(session: Session, unit: Unit, *, keep: Iterable[Unit]) -> None:
    """Read a unit's weights from NVMe; what was read earlier makes room, but not these units."""
    engine = session.engine
    try:
        try:
            engine.fault_in(unit.engine_id, session.stream())
        except BudgetError:
            session.drop_unused(keep=keep)
            engine.fault_in(unit.engine_id, session.stream())
        adopt(session, [unit])  # something may have touched it just now
        # Its address may be known to code that tells nobody of its edits.
        look_at_home(unit)
        unit.shadow_filled = True
    except BaseException:
        unit.shadow_filled, unit.home_seen = False, None
        engine.discard_shadow(unit.engine_id)
        raise


def bring_in(session: Session, units: list[Unit]) -> None:
    """Make the homes of all these units valid, current and present at once."""
    with session.lock:
        session.alive()
        for unit in units:
            session.close(unit, force=True)
            session.engine.settle(unit.engine_id, session.stream())
            take_frame_edits(session, unit)
        session._fault_in(units)


def _before_fork() -> None:
    """Let the child have a copy of what tensors and arrays besides the parameters look at: it may go on with those."""
    ranges: list[tuple[int, int]] = []
    for session in list(living):
        if session.closed or session.pid != os.getpid() or session.device.type != "cpu":
            continue
        for unit in session.units:
            if unit.home_aliased() and (unit.shadow_filled or not unit.on_nvme):
                ranges.extend((ref.home_address, ref.numel * ref.home.element_size()) for ref in unit.params)
    _core.keep_for_child(ranges)


def _after_fork_in_child() -> None:
    """Have every use of a parameter ask the guard, which refuses: a window that was open is the parent's."""
    for session in list(living):
        for unit in session.units:
            unit.inside.clear()


def install() -> None:
    """Have the process prepare for each fork."""
    os.register_at_fork(before=_before_fork, after_in_parent=_core.forked, after_in_child=_after_fork_in_child)
