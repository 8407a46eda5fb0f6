"""The page of the runtime in which ranks post what gradients they have, and that they are at their step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular import _core

if TYPE_CHECKING:
    from funicular._core import Engine
    from funicular.ranks.group import Group

__all__ = ["Page"]


class Page:
    """The page of one model's runtime; see :class:`Board`."""

    def __init__(self, engine: Engine, group: Group) -> None:
        self._engine, self._group = engine, group

    def post(self, unit: int, number: int, present: bytes) -> None:
        """See :class:`Board`, as the others."""
        _core.post_gradients(self._engine, unit, number, present)

    def posted(self, unit: int, number: int) -> list[bytes] | None:
        """Return what all ranks have posted."""
        return _core.posted_gradients(self._engine, unit, number)

    def wait(self, unit: int, number: int) -> list[bytes]:
        """Wait until all ranks have posted."""
        with self._group.waiting("peers_grads", unit):
            return _core.wait_posted(self._engine, unit, number)

    def at_step(self, number: int) -> int | None:
        """Wait until all ranks are at their step."""
        with self._group.waiting("peers_step"):
            return _core.at_step(self._engine, number)
