"""Ranks that are about to step say what, and how: it is the same everywhere, or none steps."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from funicular.errors import Error, RuntimeFailure
from funicular.ranks.meeting import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from funicular.ranks.group import Group
    from funicular.units.param import PagedParam

__all__ = ["agree_on_step", "facts_of_step"]

_NUMBERS = ("lr", "betas", "eps", "weight_decay", "maximize")


def facts_of_step(members: Iterable[tuple[PagedParam, dict[str, Any], int]]) -> dict[str, str]:
    """Return what a step is going to do: for each parameter its group's numbers, which step of it this is, and how its gradient is clipped."""
    groups: dict[int, str] = {}
    factors: dict[int, str] = {}
    found = {}
    for ref, group, count in members:
        if id(group) not in groups:
            groups[id(group)] = ", ".join(f"{name} {_plain(group[name])}" for name in _NUMBERS)
        found[f"the step of '{ref.name}'"] = (
            f"{groups[id(group)]}, step {count}{', edited' if ref.edited else ''}{_clip(ref.factor, factors)}"
        )
    return found


def _plain(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, (tuple, list)) else float(value)


def _clip(factor: torch.Tensor | None, known: dict[int, str]) -> str:
    if factor is None:
        return ""
    if id(factor) not in known:
        # To read it from a GPU would wait for the whole backward.
        known[id(factor)] = f", gradient times {float(factor)}" if factor.device.type == "cpu" else ", gradient clipped"
    return known[id(factor)]


def agree_on_step(group: Group, make: Callable[[], dict[str, str]]) -> None:
    """Compare what all ranks are about to do; ``make`` returns it, or raises on this rank.

    Raises
    ------
    RuntimeFailure
        ``FN-E702``, on all ranks, if they differ, or the step of one cannot be made.
    """
    refused: Error | None = None
    try:
        facts = make()
    except Error as error:
        refused, facts = error, {f"what rank {group.rank} says": f"that it cannot step: {error}"}
    digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=16).digest()
    if len(set(group.gather_bytes(digest, "a step"))) == 1 and refused is None:
        return
    everyone = group.gather(facts, "a step that differs")
    if refused is not None:
        raise refused
    compare(everyone, RuntimeFailure, "FN-E702", "All ranks take the same steps with the same numbers.")
    raise RuntimeFailure("FN-E702", "the ranks are about to take different steps.")
