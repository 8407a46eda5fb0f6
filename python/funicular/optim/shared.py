"""States that two parameters have in common: a step would update them twice, and places in the runtime belong to one parameter each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from funicular.optim.other_optimizers import label
from funicular.optim.state_values import Unusable
from funicular.optim.states import ParamStates
from funicular.units.dtypes import MOMENTS

__all__ = ["refuse_same", "refuse_shared"]

_KEYS = frozenset(["step", *MOMENTS, "master"])


def refuse_same(optimizer: Any, p: torch.Tensor, states: Any) -> None:
    """Refuse an object in ``optimizer.state`` that is the states of another parameter, too.

    Raises
    ------
    Unusable
        Before anything is changed.
    """
    if type(states) is ParamStates and optimizer.state.get(states.param) is states:
        raise _shared(p, "state", label(optimizer, p), label(optimizer, states.param))


def refuse_shared(optimizer: Any, found: Mapping[Any, Any]) -> None:
    """Refuse tensors that were given as states of two parameters.

    Raises
    ------
    Unusable
        Before anything is changed.
    """
    seen: dict[tuple[torch.device, int], torch.Tensor] = {}
    for p, states in found.items():
        if not isinstance(states, Mapping):
            continue
        for key, tensor in states.in_other_hands() if isinstance(states, ParamStates) else states.items():
            if key not in _KEYS or not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
                continue
            if tensor.layout != torch.strided or tensor.is_meta:
                continue
            before = seen.setdefault((tensor.device, tensor.data_ptr()), p)
            if before is not p:
                raise _shared(p, key, label(optimizer, p), label(optimizer, before))


def _shared(p: torch.Tensor, key: str, name: str, other: str) -> Unusable:
    return Unusable(p, key, f"is that of {other}, too, and each needs its own: a clone", name)
