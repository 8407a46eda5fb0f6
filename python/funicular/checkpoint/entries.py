"""What modules add to ``state_dict()`` besides parameters and buffers: found for a save, and handed back by a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular.errors import UsageError
from funicular.torch_internals.modules import adds_entries, state_dict_of
from funicular.torch_internals.overrides import unguarded
from funicular.units.param import ref_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["added_entries", "hand_back"]


def added_entries(model: nn.Module, known: Mapping[str, torch.Tensor], aliases: Iterable[str]) -> dict[str, Any]:
    """Return the entries of ``model.state_dict()`` that are none of its parameters and buffers.

    Parameters
    ----------
    known : mapping
        The model's parameters and persistent buffers, by name.
    aliases : iterable of str
        Further names of theirs.

    Raises
    ------
    UsageError
        ``FN-E408`` if the model's own ``state_dict()`` fails.
    """
    if not any(adds_entries(module) for module in model.modules()):
        return {}
    try:
        with torch.no_grad():
            state = _state_of(model)
    except Exception as error:
        text = f"{type(model).__name__}.state_dict() failed: {type(error).__name__}: {error}. Nothing was written."
        raise UsageError("FN-E408", text) from error
    names, places = {*known, *aliases}, {_place(t) for t in known.values()}
    added = {}
    for name, value in state.items():
        # A parameter under another name, as hooks rename them, is saved already.
        if name not in names and not (isinstance(value, torch.Tensor) and _place(value) in places):
            added[str(name)] = value
    return added


def _state_of(model: nn.Module) -> dict[str, Any]:
    try:
        # Parameters as they are: nothing of them is read.
        return model.state_dict(keep_vars=True)
    except TypeError:
        return model.state_dict()


def _place(tensor: torch.Tensor) -> Any:
    """Return what two tensors over the same values have in common."""
    ref = ref_of(tensor)
    like = tensor if ref is None else ref.home
    with unguarded():
        if like.layout != torch.strided or like.is_meta or like.numel() == 0:
            return id(tensor)
        try:
            return (torch.Tensor.data_ptr(like), like.dtype, tuple(like.shape), like.stride())
        except RuntimeError:  # no storage of its own
            return id(tensor)


def hand_back(model: nn.Module, entries: dict[str, Any], where: str) -> None:
    """Give entries back to the modules that they came from, by ``model.load_state_dict``.

    Parameters
    ----------
    entries : dict
        By name, tensors or values.
    where : str
        The checkpoint, for errors.

    Raises
    ------
    UsageError
        ``FN-E407`` if ``load_state_dict`` fails, or no module takes a tensor that differs from the model's own.
    """
    offered = state_dict_of(model, entries)
    try:
        with torch.no_grad():
            told = model.load_state_dict(offered, strict=False)
    except Exception as error:
        names = ", ".join(list(entries)[:5])
        text = f"{type(model).__name__}.load_state_dict() does not take what {where} has of it ({names}): {type(error).__name__}: {error}"
        raise UsageError("FN-E407", f"{text}. The parameters were loaded.") from error
    left = [name for name in getattr(told, "unexpected_keys", ()) if isinstance(entries.get(name), torch.Tensor)]
    if left:
        with torch.no_grad():
            own = _state_of(model)
        differ = [name for name in left if not _equal(own.get(name), entries[name])]
        if differ:
            raise UsageError(
                "FN-E407",
                f"no module takes {', '.join(differ[:5])} of {where}, which the saved model's state_dict() had: the class of that module "
                "has to load them (_load_from_state_dict).",
            )


def _equal(own: Any, saved: torch.Tensor) -> bool:
    if not isinstance(own, torch.Tensor) or own.shape != saved.shape or own.dtype != saved.dtype:
        return False
    return torch.equal(own.detach().cpu(), saved.cpu())
