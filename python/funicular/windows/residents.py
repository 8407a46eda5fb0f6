"""Units that live on the compute device for good: ordinary parameters, with ordinary gradients, in no window.

The planner puts there what fits beside the frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular.units.param import Link

if TYPE_CHECKING:
    import torch
    from torch import nn

    from funicular.windows.session import Session

__all__ = ["keep", "resident_session", "unkeep"]

_ATTRIBUTE = "_funicular_resident"


def keep(session: Session, params: list[nn.Parameter]) -> None:
    """Move parameters, and gradients that they have, to the compute device."""
    for p in params:
        if p.device != session.device:
            grad, p.grad = p.grad, None
            p.data = p.data.to(session.device)
            p.grad = None if grad is None else grad.to(session.device)
        setattr(p, _ATTRIBUTE, Link(session))
        session.residents.append(p)


def unkeep(session: Session) -> None:
    """Forget them; they stay where they are. Interrupted, it can be run again."""
    for p in session.residents:
        p.__dict__.pop(_ATTRIBUTE, None)


def resident_session(p: torch.Tensor) -> Session | None:
    """Return the session that keeps a parameter on its device; None for paged and for ordinary ones."""
    link = p.__dict__.get(_ATTRIBUTE)
    session: Session | None = None if link is None else link()
    return None if session is None or session.closed else session
