"""A session between steps: everything at home for a save or a load, and what was loaded shown to all tensors that look at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from funicular import _core
from funicular.errors import UsageError
from funicular.torch_internals.autograd import in_backward
from funicular.torch_internals.overrides import unguarded
from funicular.windows.replaced import check_replaced
from funicular.windows.signals import refuse

if TYPE_CHECKING:
    from funicular.units.param import PagedParam
    from funicular.windows.session import Session

__all__ = ["between_steps", "homes_changed", "preserve_aliased", "quiesce"]


def quiesce(session: Session) -> None:
    """Bring everything home that a save or a load is about.

    Raises
    ------
    UsageError
        ``FN-E115`` if another library has replaced parameters.
    """
    session.alive()
    check_replaced(session)
    session.take_all_edits()


def between_steps(session: Session) -> None:
    """Refuse a load amid something else.

    Raises
    ------
    UsageError
        ``FN-E408`` inside a forward or backward.
    RuntimeFailure
        ``FN-E106`` in a signal handler, amid the session's own work.
    """
    refuse(session, "a load")
    if in_backward() or any(unit.depth > 0 for unit in session.units):
        raise UsageError("FN-E408", "a load was asked for inside a forward or backward. Ask between steps.")


def preserve_aliased(session: Session) -> None:
    """Wait until a save has read what other code may edit without the guard's knowledge."""
    for unit in session.units:
        if unit.home_seen is not None or unit.home_aliased():
            _core.preserve(session.engine, unit.engine_id)


def homes_changed(session: Session, refs: list[PagedParam]) -> None:
    """Give what was loaded to tensors that look at homes, and count the change for saved views of them.

    Masters begin anew, unless states are loaded too: who notes those takes it back.
    """
    with unguarded():
        for ref in refs:
            torch.autograd.graph.increment_version(ref.param)
            ref.note_version()
            ref.mark_edited()
    for unit in dict.fromkeys(ref.unit for ref in refs):
        unit.begin_from(None)
        unit.fall_behind()
        session.engine.invalidate(unit.engine_id, session.stream())
    # Aliases see it now, not at their next use through a guard.
    session.take_all_edits()
