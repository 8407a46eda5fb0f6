"""What a recomputation has to find as it was: random numbers and autocast."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Autocast", "Randomness"]


class Randomness:
    """States of torch's generators before each slice, kept only where a slice drew numbers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states: list[tuple[torch.Tensor, torch.Tensor | None] | None] = []
        self._last: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def _now(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def before_slice(self) -> None:
        """Note the states; called before each slice."""
        self.end()
        self._last = self._now()

    def end(self) -> None:
        """Note that the last slice is over."""
        if self._last is not None:
            before, now = self._last, self._now()
            drew = not all(
                a is b or torch.equal(a, b) for a, b in zip(before, now, strict=True) if a is not None and b is not None
            )
            self._states.append(before if drew else None)
            self._last = None

    @contextlib.contextmanager
    def restored(self, index: int) -> Iterator[None]:
        """Run with the states from before a slice; afterwards they are what they were outside."""
        state = self._states[index]
        if state is None:
            yield
            return
        outside = self._now()
        self._set(state)
        try:
            yield
        finally:
            self._set(outside)

    def _set(self, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self._device)


class Autocast:
    """The autocast settings of a forward, to be entered in its backward."""

    def __init__(self, device: torch.device) -> None:
        self._cache = torch.is_autocast_cache_enabled()
        self._kinds = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in dict.fromkeys((device.type, "cpu"))
        ]
        self._entered: contextlib.ExitStack | None = None

    def __enter__(self) -> None:
        self._entered = contextlib.ExitStack()
        for kind, enabled, dtype in self._kinds:
            context: Any = torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._cache)
            self._entered.enter_context(context)

    def __exit__(self, *_: object) -> None:
        entered, self._entered = self._entered, None
        if entered is not None:
            entered.close()
