"""Updates of resident parameters: ``AdamW`` updates them where they are, by one kernel each; their states are tensors of that device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from funicular._core import ResidentUpdate
from funicular.units.dtypes import TRAINED, is_half

if TYPE_CHECKING:
    from funicular.optim.states import ParamStates
    from funicular.windows.session import Session

__all__ = ["resident_update"]


def resident_update(
    session: Session, p: nn.Parameter, grad: torch.Tensor, states: ParamStates, hyper: int
) -> ResidentUpdate | None:
    """Describe one parameter's update for the runtime; None if its tensors are not as the kernels need them."""
    known = TRAINED.get(p.dtype)
    if known is None or type(grad) is not torch.Tensor or not isinstance(p, nn.Parameter):
        return None
    if grad.dtype != p.dtype or grad.device != p.device or p.device != session.device or grad.stride() != p.stride():
        return None
    moments = [states.tensor(name) for name in ("exp_avg", "exp_avg_sq")]
    master = states.tensor("master") if is_half(p.dtype) else None
    if any(t.stride() != p.stride() or t.device != p.device for t in moments if p.numel() > 1):
        return None
    edited = states.plain_version not in (-1, p._version)
    return ResidentUpdate(
        param=p.data_ptr(),
        grad=grad.data_ptr(),
        master=0 if master is None else master.data_ptr(),
        exp_avg=moments[0].data_ptr(),
        exp_avg_sq=moments[1].data_ptr(),
        len=p.numel(),
        dtype=known.name,
        hyper=hyper,
        reset_master=edited,
    )
