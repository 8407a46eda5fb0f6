"""Models that are not offloaded and hold half of a load: they refuse to run until a load succeeds."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from funicular.errors import RuntimeFailure

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["check_whole", "mark_partial", "mark_whole"]


class _Refusal:
    """A hook that raises."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, *_: Any) -> None:
        raise RuntimeFailure("FN-E410", f"{self.why} Load a whole checkpoint; until then the model is not used.")


_partial: weakref.WeakKeyDictionary[nn.Module, tuple[_Refusal, list[Any]]] = weakref.WeakKeyDictionary()


def mark_partial(model: nn.Module, opt: torch.optim.Optimizer | None, why: str) -> None:
    """Have every forward of the model and every step of the optimizer raise ``FN-E410``."""
    mark_whole(model)
    refusal = _Refusal(why)
    hooks: list[Any] = [module.register_forward_pre_hook(refusal) for module in model.modules()]
    if opt is not None:
        hooks.append(opt.register_step_pre_hook(refusal))
    _partial[model] = (refusal, hooks)


def mark_whole(model: nn.Module) -> None:
    """Take back what :func:`mark_partial` did."""
    _, hooks = _partial.pop(model, (None, []))
    for hook in hooks:
        hook.remove()


def check_whole(model: nn.Module) -> None:
    """Raise ``FN-E410`` if the model holds half of a load."""
    if model in _partial:
        _partial[model][0]()
