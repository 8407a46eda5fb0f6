"""Units that live on the compute device for good: ordinary parameters, with ordinary gradients, in no window.

The planner puts there what fits beside the frames. ``AdamW`` updates them where they are, by one kernel each; their states are
tensors of that device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from funicular._model import Link

if TYPE_CHECKING:
    from funicular._session import Session
    from funicular._states import ParamStates

__all__ = ["keep", "resident_session", "resident_update", "unkeep"]

_ATTRIBUTE = "_funicular_resident"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

#: addresses of parameter, gradient, master, exp_avg, exp_avg_sq; elements, dtype, which hyperparameters, master starts anew
ResidentUpdate = tuple[int, int, int, int, int, int, str, int, bool]


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


def resident_update(session: Session, p: nn.Parameter, states: ParamStates, hyper: int) -> ResidentUpdate | None:
    """Describe one parameter's update for the runtime; None if its tensors are not as the kernels need them."""
    grad = p.grad
    dtype = _DTYPES.get(p.dtype)
    if grad is None or dtype is None or type(grad) is not torch.Tensor or not isinstance(p, nn.Parameter):
        return None
    if grad.dtype != p.dtype or grad.device != p.device or p.device != session.device or grad.stride() != p.stride():
        return None
    moments = [states.tensor(name) for name in ("exp_avg", "exp_avg_sq")]
    master = states.tensor("master") if p.dtype != torch.float32 else None
    if any(t.stride() != p.stride() or t.device != p.device for t in moments if p.numel() > 1):
        return None
    edited = states.plain_version not in (-1, p._version)
    return (
        p.data_ptr(),
        grad.data_ptr(),
        0 if master is None else master.data_ptr(),
        moments[0].data_ptr(),
        moments[1].data_ptr(),
        p.numel(),
        dtype,
        hyper,
        edited,
    )
