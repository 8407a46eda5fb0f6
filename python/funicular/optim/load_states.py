"""How ``AdamW.state_dict`` and ``load_state_dict`` pass states through torch's own methods, between the hooks of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from funicular.errors import UsageError
from funicular.optim.state_values import Unusable, cloned
from funicular.optim.states import ParamStates

__all__ = ["Sealed", "refuse_options", "seal", "show", "unsealed"]

_UNSUPPORTED = ("amsgrad", "capturable", "differentiable")


class Sealed:
    """A state on its way through torch's ``load_state_dict``, which would cast moments to the type of their weights."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def seal(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Seal the states: the last hook before torch loads."""
    return {**state_dict, "state": {key: Sealed(value) for key, value in state_dict["state"].items()}}


def show(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Put copies in place of states: the first hook after torch has packed them."""
    packed = state_dict["state"]
    for key, states in list(packed.items()):
        if isinstance(states, ParamStates):
            packed[key] = states.copies()
        elif isinstance(states, Mapping):
            packed[key] = cloned(dict(states))
        if isinstance(key, int) and len(packed[key]) == 0:
            del packed[key]


def refuse_options(group: dict[str, Any]) -> None:
    """Refuse a group's options that change what a step would have to do.

    Raises
    ------
    UsageError
        ``FN-E117``.
    """
    for name in _UNSUPPORTED:
        if group.get(name):
            raise UsageError(
                "FN-E117", f"AdamW does not support {name}=True, which a group of parameters has. Set it to False."
            )


def unsealed(entries: dict[Any, Any]) -> tuple[dict[torch.Tensor, ParamStates], dict[Any, Any]]:
    """Return the states of parameters, checked and in memory of their own, and what belongs to no parameter.

    Raises
    ------
    Unusable
        For states that are incomplete or do not fit. Nothing was changed.
    """
    made: dict[torch.Tensor, ParamStates] = {}
    others = {}
    for key, entry in entries.items():
        value = entry.value if isinstance(entry, Sealed) else entry
        if not isinstance(key, torch.Tensor):
            others[key] = value
        elif value:
            if not isinstance(value, Mapping):
                raise Unusable(key, "state", f"is a {type(value).__name__}, not a dictionary")
            made[key] = ParamStates.of(key, value, loaded=True)
    return made, others
