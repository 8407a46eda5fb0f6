"""Signal handlers that use the model amid the session's own work.

Python runs a handler between two instructions, or in a wait of the core: the session's lock is then held by the handler's own thread,
which goes on with what it was doing once the handler has returned. Such a handler may read and save: nothing that is under way is
touched by that. What would change windows or weights under it is refused.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from funicular import _core
from funicular.errors import RuntimeFailure, UsageError
from funicular.homes.digests import digest
from funicular.homes.edits import take_edits
from funicular.torch_internals.autograd import in_backward, waits_for_backward
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["await_reads", "look", "note_step", "refuse", "refuse_backward", "under_way"]

_OWNER = re.compile(r"owner=(\d+)")


def under_way(session: Session) -> bool:
    """Whether a forward, a backward or work of the session itself is under way around the caller."""
    return session.busy() or in_backward() or any(unit.depth > 0 for unit in session.units)


def refuse(session: Session, what: str) -> None:
    """Refuse a call that a signal handler makes amid the session's own work.

    Raises
    ------
    RuntimeFailure
        ``FN-E106``.
    """
    if session.busy():
        raise _refused(what)


def refuse_backward(session: Session) -> None:
    """Refuse the work of a backward that the owner of the session's lock waits for.

    On a GPU autograd differentiates in a thread of its own. A signal handler that calls ``backward`` amid the session's own work has that
    thread ask for the lock, which the handler's thread will not give up before the backward is over.

    Raises
    ------
    RuntimeFailure
        ``FN-E106``.
    """
    if session.busy():
        return
    found = _OWNER.search(repr(session.lock))
    if found is not None and (owner := int(found[1])) and waits_for_backward(sys._current_frames().get(owner)):
        raise _refused("a backward")


def _refused(what: str) -> RuntimeFailure:
    return RuntimeFailure(
        "FN-E106",
        f"{what} was asked for by a signal handler amid a step or a page-in. A handler may read weights and states and call "
        "funicular.save; set a flag in it for the rest, and look at the flag between steps.",
    )


def note_step(session: Session) -> None:
    """Take note of a step that the runtime has taken and that is not noted yet: all of it, also if signals interrupt."""
    if session.unnoted is None:
        return
    # The step of another thread, which holds the lock, takes note of itself; nothing may look at versions halfway.
    with session.lock:
        if session.unnoted is not None:
            _core.complete(session.unnoted)


def look(session: Session) -> None:
    """Take note of edits for a save, and leave windows as they are: the homes of open ones are current unless edited inside.

    Raises
    ------
    UsageError
        ``FN-E408`` for a weight that was edited inside a window that is open.
    RuntimeFailure
        ``FN-E410`` amid a load.
    """
    session.alive()
    if session.loading:
        raise RuntimeFailure("FN-E410", "a load is under way: the model holds parts of two states. Save after it.")
    for unit in session.units:
        if unit.is_open or unit.moving:
            _check_inside(unit)
            continue
        if unit.behind:
            session.homes.catch_up(unit)
        take_edits(session.homes, unit)


def await_reads(session: Session) -> None:
    """Wait until the save under way has read everything: what goes on afterwards may be amid an edit."""
    for unit in session.units:
        _core.preserve(session.engine, unit.engine_id)


def _check_inside(unit: Unit) -> None:
    with unguarded():
        for ref in unit.params:
            if unit.dirty or (ref.at_frame() and _edited(ref)):
                raise UsageError(
                    "FN-E408",
                    f"'{ref.name}' was edited inside the forward that is under way, and is not home yet. Save between steps.",
                )


def _edited(ref: PagedParam) -> bool:
    return ref.param._version != ref.version or (ref.seen is not None and digest(ref.frame) != ref.seen)
