"""Host memory for activations: exact sizes out of regions that the runtime page-locks within ``budget.host``.

Regions are taken as they are needed, in the first step, and kept; later steps take and give ranges of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from funicular.homes.moved import tensor_over

if TYPE_CHECKING:
    from funicular._core import Engine

__all__ = ["Arena", "Place"]

_ALIGN = 4096


class Place(NamedTuple):
    """A range of a region."""

    region: int
    start: int
    size: int
    bytes: torch.Tensor


class _Region:
    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        #: (start, size) of free ranges, in order, never touching
        self.free: list[tuple[int, int]] = [(0, memory.numel())]

    def take(self, size: int) -> int | None:
        """Take the smallest range that fits."""
        fitting = [(length, start) for start, length in self.free if length >= size]
        if not fitting:
            return None
        length, start = min(fitting)
        at = self.free.index((start, length))
        self.free[at : at + 1] = [(start + size, length - size)] if length > size else []
        return start

    def give(self, start: int, size: int) -> None:
        """Give a range back."""
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self.free, (start, size)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self.free = merged


class Arena:
    """Ranges of page-locked host memory."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._regions: list[_Region] = []
        #: a region is at least as large, so that a step takes few; page-locking is slow
        self._step = (64 << 20) if device.type == "cuda" else (1 << 20)

    def take(self, nbytes: int) -> Place:
        """Return a range of at least ``nbytes``, aligned to 4096 bytes.

        Raises
        ------
        BudgetError
            ``FN-E202`` if ``budget.host`` has no room for it.
        """
        size = -(-nbytes // _ALIGN) * _ALIGN
        for index, region in enumerate(self._regions):
            start = region.take(size)
            if start is not None:
                return self._place(index, start, size, nbytes)
        capsule = self._engine.activation_buffer(size, max(size, self._step))
        with torch.inference_mode(mode=False):
            self._regions.append(_Region(tensor_over(capsule)))
        start = self._regions[-1].take(size)
        assert start is not None
        return self._place(len(self._regions) - 1, start, size, nbytes)

    def _place(self, index: int, start: int, size: int, nbytes: int) -> Place:
        return Place(index, start, size, self._regions[index].memory[start : start + nbytes])

    def give(self, place: Place) -> None:
        """Give a range back."""
        self._regions[place.region].give(place.start, place.size)

    @property
    def reserved(self) -> int:
        """Bytes of all regions."""
        return sum(r.memory.numel() for r in self._regions)

    @property
    def in_use(self) -> int:
        """Bytes taken and not given back."""
        return sum(r.memory.numel() - sum(size for _, size in r.free) for r in self._regions)
