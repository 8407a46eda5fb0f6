"""Which part of a gradient goes to whom: arithmetic alone, without engine or processes.

Each element of a parameter belongs to one rank, which sums the gradients of all for it (`means.py`). On the wire there are bytes; the sum is the owner's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from funicular.ranks.group import Group

__all__ = ["Slice", "cut", "dealt", "flat"]


class Slice(NamedTuple):
    """A part of one parameter that belongs to one rank."""

    owner: int
    #: elements of the parameter before it
    start: int
    numel: int


def cut(start: int, numel: int, owned: Sequence[Sequence[tuple[int, int]]]) -> list[Slice]:
    """Cut a parameter of ``numel`` elements, which begins at ``start`` in its section, where its owner changes.

    ``owned``: for each rank its ranges of the section, first element and elements.

    Raises
    ------
    ValueError
        If an element belongs to no rank, or to two.
    """
    found = []
    for owner, ranges in enumerate(owned):
        for first, size in ranges:
            begin, end = max(first, start), min(first + size, start + numel)
            if begin < end:
                found.append(Slice(owner, begin - start, end - begin))
    found.sort(key=lambda s: s.start)
    at = 0
    for one in found:
        if one.start != at:
            break
        at += one.numel
    if at != numel:
        raise ValueError(f"elements {at} and following of {numel} have no owner, or two: {found}")
    return found


def dealt(keys: Iterable[Hashable], group: Group | None) -> list[bool]:
    """Return for each key whether it is this rank's: keys in a row are dealt to one rank after another, equal ones to the same."""
    keys = list(keys)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    if group is None:
        return [True] * len(keys)
    return [numbers[key] * group.size // len(numbers) == group.rank for key in keys]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements in the order in which they lie in memory."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))
