"""Which offloaded model a caller means: the model that was given, or the one that it wraps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from funicular.errors import UsageError
from funicular.units.param import ref_of
from funicular.windows.residents import resident_session

if TYPE_CHECKING:
    import torch

    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["ATTRIBUTE", "offloaded", "owner_of", "session_for", "session_of"]

ATTRIBUTE = "_funicular_session"


def session_of(model: nn.Module) -> Session | None:
    """Return the session of an offloaded model."""
    return model.__dict__.get(ATTRIBUTE)


def owner_of(unit: Unit) -> Session:
    """Return the session of a unit, for what is above it."""
    session: Any = unit.owner
    return session  # type: ignore[no-any-return]


def session_within(model: Any) -> tuple[nn.Module, Session] | None:
    """Return the offloaded model that a model is or wraps, and its session; None if nothing of it is offloaded.

    Raises
    ------
    UsageError
        ``FN-E114`` if there is no one answer: for a part of an offloaded model, for a module that contains several offloaded models
        or weights of another one, and for an object that is no module. The message says what to give.
    """
    if not isinstance(model, nn.Module):
        raise UsageError("FN-E114", f"this is a {type(model).__name__}, not a torch.nn.Module. {_advice(model)}")
    session = session_of(model)
    if session is not None:
        return model, session
    parts = {name: (part, s) for name, part in model.named_modules() if (s := session_of(part)) is not None}
    if len(parts) > 1:
        raise UsageError(
            "FN-E114",
            f"this {type(model).__name__} wraps several offloaded models. Give one of them: {_listed(parts)}.",
        )
    own = [s for _, s in parts.values()]
    for name, p in model.named_parameters():
        other = _session_with(p)
        if other is not None and other not in own:
            raise UsageError("FN-E114", f"'{name}' belongs to an offloaded model. {_whole(model, other)}")
    return next(iter(parts.values()), None)


def session_for(model: Any) -> Session | None:
    """Return the session of the offloaded model that a model is or wraps, as :func:`session_within` finds it."""
    found = session_within(model)
    return None if found is None else found[1]


def offloaded(model: Any) -> tuple[nn.Module, Session]:
    """As :func:`session_within`, for what needs an offloaded model.

    Raises
    ------
    UsageError
        ``FN-E114`` also if nothing of the model is offloaded.
    """
    found = session_within(model)
    if found is None:
        raise UsageError("FN-E114", "the model is not offloaded.")
    return found


def _session_with(p: torch.Tensor) -> Session | None:
    ref = ref_of(p)
    return resident_session(p) if ref is None else owner_of(ref.unit)


def _whole(model: nn.Module, session: Session) -> str:
    root = None if session.held is None else session.held.model()
    if root is None:
        return "Give the model that was given to funicular.offload."
    path = next((name for name, module in root.named_modules() if module is model), "")
    part = f"This {type(model).__name__} is its part '{path}'. " if path else ""
    return f"{part}Give the {type(root).__name__} that was given to funicular.offload."


def _advice(owner: Any) -> str:
    held = vars(owner) if hasattr(owner, "__dict__") else {}
    parts = [name for name, value in held.items() if isinstance(value, nn.Module) and _holds(value)]
    if not parts:
        return "Give the model that was given to funicular.offload."
    return f"Give the offloaded model that it holds: {_listed(parts)}."


def _holds(module: nn.Module) -> bool:
    return any(session_of(part) is not None for part in module.modules())


def _listed(parts: Any) -> str:
    return ", ".join(f"model.{name}" for name in parts)
