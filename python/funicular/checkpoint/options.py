"""Options of an optimizer's groups: what a save writes of them is what a load takes, and what a step can use."""

from __future__ import annotations

from typing import Any

import torch

from funicular.checkpoint.facts import encode
from funicular.errors import UsageError
from funicular.optim.adamw import AdamW

__all__ = ["encode_options", "unusable_option"]

_NUMBERS = ("lr", "eps", "weight_decay")


def encode_options(opt: torch.optim.Optimizer, group: dict[str, Any], index: int) -> Any:
    """Return what JSON holds of a group's options.

    Raises
    ------
    UsageError
        ``FN-E408`` for what JSON cannot hold, and for what no load would take.
    """
    options = {key: _number_of(opt, key, value) for key, value in group.items() if key != "params"}
    if (why := unusable_option(opt, options)) is not None:
        raise UsageError(
            "FN-E408", f"{why} of group {index} of the optimizer, which no step can use. Put it right first."
        )
    return encode(options, f"group {index}")


def _number_of(opt: torch.optim.Optimizer, key: str, value: Any) -> Any:
    """Return the number that a tensor in place of one of the optimizer's own options has: a learning rate may be a tensor."""
    if isinstance(value, torch.Tensor) and key in opt.defaults and value.numel() == 1 and not value.is_complex():
        return float(value)
    return value


def unusable_option(opt: torch.optim.Optimizer, options: dict[str, Any]) -> str | None:
    """Return which of a group's options no step of this optimizer can use, and its value; None if all are well.

    Entries of the user's own may be anything.
    """
    for key, value in options.items():
        if isinstance(opt, (AdamW, torch.optim.Adam, torch.optim.AdamW)):
            right = _is_usable(key, value)
        else:
            right = key not in opt.defaults or _is_like(opt.defaults[key], value)
        if not right:
            return f"{key} = {_shown(value)}"
    return None


def _is_usable(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        return _is_number(value)
    if key == "betas":
        return _are_numbers(value) and len(value) == 2 and all(0 <= beta < 1 for beta in value)
    return True


def _is_like(own: Any, value: Any) -> bool:
    if isinstance(own, torch.Tensor) or _is_number(own):
        return _is_number(value)
    if _are_numbers(own) and own:
        return _are_numbers(value) and len(value) == len(own)
    return True


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and float(value) is not None
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    try:
        return repr(value)[:100]
    except ValueError:
        return "a number of thousands of digits"
