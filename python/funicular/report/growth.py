"""States that move up into free memory of the device, and down again: what is said of it, and what torch calls for it."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from funicular import _core
from funicular.report.log import progress
from funicular.torch_internals import last_resort

if TYPE_CHECKING:
    import torch

    from funicular._core import Engine

__all__ = ["Growth"]

_WHY = {
    "room": "the memory was free",
    "short": "memory was short",
    "asked": "torch found no memory, or its cache was emptied",
    "written": "they are written",
    "off": "growth was turned off",
}


class Growth:
    """What one model's runtime does with free memory of the device."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device
        #: of the last move that was told
        self._told = 0
        #: blocks that torch had given back when it was last armed; None: nothing moves up
        self._armed: int | None = None

    def begin(self) -> None:
        """Have states move up, if torch can have them moved down: on a GPU only, whose memory others use too."""
        if self._device.type != "cuda" or not _core.may_grow(self._engine):
            return
        if not last_resort.works(self._device):
            progress(
                "FN-I308 memory that stays free is not used for optimizer states: this torch cannot ask for it back"
            )
            return
        self._arm()
        _core.let_grow(self._engine, True)

    def _arm(self) -> None:
        last_resort.arm(self._device)
        self._armed = _core.blocks_given_back()

    def stepped(self) -> None:
        """Tell of each set of moves once."""
        if self._armed is not None and _core.blocks_given_back() > self._armed:
            self._arm()
        new = list(_core.grown(self._engine, self._told)["moves"])
        for (step, why), group in groupby(new, key=lambda move: (move[1], move[4])):
            units = list(group)
            progress(
                "FN-I309 step %d: optimizer states of %d units, %.2f GB, moved %s: %s",
                step,
                len(units),
                sum(move[3] for move in units) / 1e9,
                "up into memory of the device" if why == "room" else "down",
                _WHY[why],
            )
        if new:
            self._told = new[-1][0]
