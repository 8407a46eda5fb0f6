"""Norms of gradients that ranks exchange, taken as they are exchanged.

The mean of all ranks lies in host memory, in parts that came from their owners. A norm is a pass over the whole, by the same operation as in one
process, for the same bits; over the link of a GPU that pass takes longer than the exchange. So where clipping asks for norms the owners send their
parts of the mean to all others, from GPU to GPU, and each rank takes the norm in memory of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from funicular.gradients.clipping import note_norms
from funicular.ranks.slices import flat
from funicular.torch_internals.operations import FOREACH_COPY
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from funicular.ranks.group import Group
    from funicular.ranks.slices import Slice
    from funicular.units.param import PagedParam

__all__ = ["DEVICES", "is_wanted", "take_norms"]

#: Devices whose ranks send means to each other. On the host the place of a gradient is as near as any other memory.
DEVICES = frozenset(["cuda"])


def is_wanted(ref: PagedParam, kind: str, *, adds: bool) -> bool:
    """Whether a norm is to be taken as a gradient is exchanged: it is the last one expected before the step.

    ``kind``: the operation by which clipping asks for norms, if it does. ``adds``: the gradient is added to what is there.
    """
    return bool(kind) and ref.home.device.type in DEVICES and (ref.came if adds else 0) + 1 >= ref.expected


def take_norms(
    group: Group,
    unit: int,
    whole: Iterable[tuple[PagedParam, Sequence[Slice]]],
    means: dict[PagedParam, list[tuple[Slice, torch.Tensor]]],
    kind: str,
) -> None:
    """Take the norms of these parameters' gradients. All ranks call it, with the same parameters of a unit.

    Parameters
    ----------
    whole
        Parameters, each with the parts of its elements and their owners.
    means
        This rank's parts of their gradients, one-dimensional, in the parameters' number format.
    kind
        The operation, see :func:`note_norms`.
    """
    sends: list[tuple[int, torch.Tensor]] = []
    receives: list[tuple[int, torch.Tensor]] = []
    gradients: list[tuple[PagedParam, torch.Tensor]] = []
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    for ref, parts in whole:
        # As the gradient in its place, elements in the same order in memory.
        gradient = torch.empty_strided(ref.home.size(), ref.home.stride(), dtype=ref.home.dtype, device=ref.home.device)
        elements = flat(gradient)
        gradients.append((ref, gradient))
        for one, mean in means.get(ref, ()):
            own.append((elements[one.start : one.start + one.numel], mean))
            sends += [(rank, mean) for rank in range(group.size) if rank != group.rank]
        others = (one for one in parts if one.owner != group.rank)
        receives += [(one.owner, elements[one.start : one.start + one.numel]) for one in others]
    if own:
        FOREACH_COPY([place for place, _ in own], [mean for _, mean in own])
    group.transfer(sends, receives, unit)
    with unguarded():
        leaving = []
        for ref, gradient in gradients:
            assert ref.grad is not None
            leaving.append((ref, gradient, ref.grad))
        note_norms(leaving, kind)
