"""Weights that code touches which asks no guard: the kernels of a compiled step, and a forked child."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from funicular import _core
from funicular.homes.edits import take_frame_edits
from funicular.windows.shutdown import living

if TYPE_CHECKING:
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["bring_in", "install"]


def bring_in(session: Session, units: list[Unit]) -> None:
    """Make the homes of all these units valid, current and present at once."""
    with session.lock:
        session.alive()
        for unit in units:
            session.close(unit, force=True)
            session.engine.settle(unit.engine_id, session.stream())
            take_frame_edits(session.homes, unit)
        session.homes.fault_in(units)


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
