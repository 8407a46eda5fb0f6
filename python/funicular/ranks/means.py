"""The means over ranks of the parts of a unit's gradients that this rank owns.

The core makes all of them at once, in one launch on a GPU: a kernel of torch for each operation on each part fills the queue of the exchange's stream
while that waits for another rank, and the thread of the backward with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from funicular import _core
from funicular.torch_internals.memory import stream_of
from funicular.units.dtypes import name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from funicular._core import Engine
    from funicular.ranks.slices import Slice

__all__ = ["Means"]

#: bytes to which pieces are aligned, so that kernels read as many at a time
_ALIGNED = 16


class _Part(NamedTuple):
    dtype: torch.dtype
    one: Slice
    #: all elements of this rank's gradient
    mine: torch.Tensor | None
    #: other ranks that have a piece, ascending
    others: list[int]
    #: bytes before the first of their pieces, and from each to the next
    at: int
    stride: int


class Means:
    """Parts of gradients, in the order in which they were added: pieces of other ranks arrive in one allocation.

    It is made, used and let go of on the stream that computes the means: torch reuses its memory in the order of that stream.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self._rank, self._size, self._device = rank, size, device
        self._parts: list[_Part] = []
        self._nbytes = 0
        self._room: torch.Tensor

    def add(self, dtype: torch.dtype, one: Slice, mine: torch.Tensor | None, ranks: Sequence[int]) -> None:
        """Take a part of a gradient that ``ranks``, ascending, have; ``mine``: all elements of this rank's, if it is one of them."""
        others = [rank for rank in ranks if rank != self._rank]
        stride = -(-one.numel * dtype.itemsize // _ALIGNED) * _ALIGNED
        self._parts.append(_Part(dtype, one, mine, others, self._nbytes, stride))
        self._nbytes += stride * len(others)

    def receives(self) -> list[tuple[int, torch.Tensor]]:
        """Return where the pieces of other ranks are to go, as bytes: part after part, ascending by rank. To be called once, after the last part."""
        room = self._room = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
        found = []
        for dtype, one, _, others, at, stride in self._parts:
            nbytes = one.numel * dtype.itemsize
            for i, rank in enumerate(others):
                begin = at + i * stride
                found.append((rank, room[begin : begin + nbytes]))
        return found

    def make(self, engine: Engine) -> list[torch.Tensor]:
        """Return the mean of each part, in its format, once all pieces are there: summed in fp32 ascending by rank, divided, rounded once."""
        room = self._room.data_ptr()
        found, parts = [], []
        for dtype, one, mine, others, at, stride in self._parts:
            mean = torch.empty(one.numel, dtype=dtype, device=self._device)
            found.append(mean)
            own = 0 if mine is None else mine.data_ptr() + one.start * dtype.itemsize
            before = sum(rank < self._rank for rank in others)
            parts.append(
                _core.MeanPart(mean.data_ptr(), own, room + at, stride, len(others), before, one.numel, name_of(dtype))
            )
        if parts:
            _core.mean_of_ranks(engine, parts, self._size, stream_of(self._device))
        return found
