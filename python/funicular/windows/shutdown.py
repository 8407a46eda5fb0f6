"""How sessions end without a call of ``unwrap``: with their model, or with the process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING

from funicular.errors import Error, RuntimeFailure
from funicular.homes.edits import take_edits
from funicular.torch_internals.compiling import captured, not_captured

if TYPE_CHECKING:
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["check_alive", "check_process", "install", "leave", "living"]

#: closed at exit, before torch goes, so that no directory stays behind
living: weakref.WeakSet[Session] = weakref.WeakSet()


def _close_all() -> None:
    for session in list(living):
        if os.getpid() == session.pid:
            if not session.closed:
                session.log.ended()
            session.closed = True
            _end_updates(session)
            session.engine.close()


def _end_updates(session: Session) -> None:
    """Have this rank's part of the last step done, which the others wait for, and leave them."""
    if session.group is not None:
        session.gradients.closing()
        with contextlib.suppress(Error):
            session.engine.settle_all()
        session.group.close()


def _in_child() -> None:
    """In a forked child the thread that held a session's lock does not exist: a use must be refused, not wait for it."""
    for session in list(living):
        session.lock = threading.RLock()
        session.busy = session.lock._is_owned  # type: ignore[attr-defined]


def install() -> None:
    """Have sessions closed when the process ends, and refused in its children."""
    atexit.register(_close_all)
    os.register_at_fork(after_in_child=_in_child)


_offloaded_in: set[int] = set()


def check_process() -> None:
    """Refuse to offload in a child forked from a process that has offloaded: locks of the parent's threads would never be let go.

    Raises
    ------
    RuntimeFailure
        ``FN-E103``.
    """
    if _offloaded_in and os.getpid() not in _offloaded_in:
        raise RuntimeFailure(
            "FN-E103",
            "this process was forked from one that had offloaded a model, and cannot offload one of its own. Start it with the "
            "method 'spawn' or 'forkserver', or fork before the parent offloads.",
        )
    _offloaded_in.add(os.getpid())


def leave(session: Session, unit: Unit) -> None:
    """Make a unit's parameters that are still held ordinary tensors over their home; the session is ending."""
    if unit.on_nvme:
        # More than the reference and the argument of the call: the caller keeps a parameter.
        if not any(sys.getrefcount(ref.param) > 2 for ref in unit.params):
            return
        session.engine.fault_in(unit.engine_id, session.stream())
    else:
        try:
            session.engine.settle(unit.engine_id, session.stream())
        except Error:
            # The first call reports a failure that no call had reported yet; after that, homes in host memory stay
            # readable.
            session.engine.settle(unit.engine_id, session.stream())
    take_edits(session.homes, unit)
    for ref in unit.params:
        with contextlib.suppress(Error):
            if ref.states is not None:
                ref.states.detach()
        ref.param.__class__ = ref.kind
        ref.param.data = ref.home
        ref.param.__dict__.pop("_funicular_inside", None)


def check_alive(session: Session) -> None:
    """Raise if the model cannot be used: closed, not whole, or another process's."""
    if session.closed:
        raise RuntimeFailure("FN-E104", "the model is no longer offloaded.")
    if captured():
        raise not_captured()
    if session.partial:
        raise RuntimeFailure("FN-E410", f"{session.partial} Load a whole checkpoint; until then the model is not used.")
    if os.getpid() != session.pid:
        raise RuntimeFailure(
            "FN-E103",
            "the model was offloaded by the parent of this process. Use it there; in a child, load a copy.",
        )
