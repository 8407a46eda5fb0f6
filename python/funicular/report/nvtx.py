"""NVTX ranges for Nsight Systems: forward and backward of every unit, and steps, where the policy asks for them (``log.nvtx``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Ranges", "ranges"]


class Ranges:
    """Ranges of one model; without functions to start and to end them there are none."""

    def __init__(self, start: Callable[[str], Any] | None = None, end: Callable[[Any], Any] | None = None) -> None:
        self._start, self._end = start, end
        self._backward: tuple[str, Any] | None = None

    def start(self, name: str) -> Any:
        """Start a range; gives what :meth:`end` takes."""
        return None if self._start is None else self._start(f"funicular: {name}")

    def end(self, started: Any) -> None:
        """End a range, if there is one."""
        if started is not None and self._end is not None:
            self._end(started)

    def backward(self, unit: str | None) -> None:
        """Note that the backward has come to the unit of a name, or to its end."""
        if self._start is None or (self._backward is not None and self._backward[0] == unit):
            return
        before, self._backward = self._backward, None
        if before is not None:
            self.end(before[1])
        if unit is not None:
            self._backward = (unit, self.start(f"{unit} backward"))


def ranges(wanted: bool, device: torch.device) -> Ranges:
    """Return torch's ranges where they are wanted and there is a GPU to look at."""
    if wanted and device.type == "cuda":
        return Ranges(torch.cuda.nvtx.range_start, torch.cuda.nvtx.range_end)
    return Ranges()
