"""What several ranks do together, for those who call it on every rank."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from funicular import _core
from funicular.errors import Error
from funicular.ranks.meeting import agreed
from funicular.ranks.steps import agree_on_step, facts_of_step
from funicular.units.param import ref_of
from funicular.windows.lookup import owner_of
from funicular.windows.shutdown import living

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from funicular.units.param import PagedParam
    from funicular.windows.session import Session

__all__ = ["agree", "all_together", "join_ranks", "leave_ranks", "meet", "together", "whole"]


def meet(session: Session | None, what: str) -> None:
    """Wait until all ranks are here; nothing for a process alone."""
    if session is not None and session.group is not None:
        with session.group.waiting("peers_step"):
            _core.meet(session.engine, what)


@contextlib.contextmanager
def together(session: Session | None, what: str) -> Iterator[None]:
    """Have all ranks do something, or one of them while the others wait: none goes on before all have, and what fails on one fails on all.

    Raises
    ------
    RuntimeFailure
        ``FN-E721`` where another rank failed; the rank itself raises what went wrong there.
    """
    if session is None or session.group is None:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    meet(session, f"the moment when all have {what}")
    with agreed(session.group, what):
        if failed is not None:
            raise failed


@contextlib.contextmanager
def all_together(params: Iterable[torch.Tensor], what: str) -> Iterator[None]:
    """Have all ranks that train these parameters do something that they have all come to; see :func:`together`."""
    found = dict.fromkeys(owner_of(ref.unit) for p in params if (ref := ref_of(p)) is not None)
    with contextlib.ExitStack() as stack:
        for session in found:
            meet(session, f"the moment when all are about to have {what}")
            stack.enter_context(together(session, what))
        yield


def leave_ranks(session: Session) -> None:
    """Before this rank ends its model: wait until all are here, since none can train without the others; or have ended theirs."""
    if session.group is None:
        return
    if session.engine.failed():
        session.gradients.drop_unfinished()
    else:
        _core.meet(session.engine, "funicular.unwrap", True)


@contextlib.contextmanager
def whole(sessions: Iterable[Session], what: str) -> Iterator[None]:
    """Do what the other ranks of these models count on from now on."""
    ranked = [session for session in sessions if session.group is not None]
    with contextlib.ExitStack() as stack:
        for session in ranked:
            assert session.group is not None
            stack.enter_context(session.group.whole(what))
        yield
    for session in ranked:
        with contextlib.suppress(Error):  # of a model that has failed meanwhile
            _core.tell_ranks(session.engine, f"after {what}")


def join_ranks(params: Iterable[torch.Tensor]) -> list[Session]:
    """Before a step of these parameters: wait until all ranks that train them are at theirs. Returns what they train with others."""
    if all(session.group is None for session in living):
        return []
    sessions = dict.fromkeys(owner_of(ref.unit) for p in params if (ref := ref_of(p)) is not None)
    joined = [session for session in sessions if session.group is not None]
    for session in joined:
        session.join()
    return joined


def agree(session: Session, units: Iterable[list[tuple[PagedParam, Any, dict[str, Any]]]]) -> None:
    """Before a step of these units' parameters, each with its states and its group: compare with the other ranks what is to be done.

    Raises
    ------
    RuntimeFailure
        ``FN-E702`` on all ranks if they differ.
    UsageError
        ``FN-E722`` on the rank that has changed a gradient.
    """
    group = session.group
    assert group is not None
    members = [member for unit in units for member in unit]

    def facts() -> dict[str, str]:
        for ref, states, _ in members:
            session.gradients.take_back(ref)
            states.refuse_edits()
        return facts_of_step((ref, options, states.count + 1) for ref, states, options in members)

    agree_on_step(group, facts)
    session.gradients.to_step({ref: ref.param.grad for ref, *_ in members if ref.param.grad is not None})
