"""Switches that break a mechanism on purpose, so that tests can show that they would notice."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["break_", "broken"]

_KNOWN = frozenset(
    {"skip_backward_reload", "drop_gradient", "wrong_gate", "round_every_slice", "skip_random_restore", "never_fill"}
)
_active: set[str] = set()


def broken(what: str) -> bool:
    """Whether a mechanism is broken now."""
    return what in _active


@contextlib.contextmanager
def break_(what: str) -> Iterator[None]:
    """Break one mechanism within the context."""
    if what not in _KNOWN:
        msg = f"unknown mechanism {what!r}; known: {sorted(_KNOWN)}"
        raise ValueError(msg)
    _active.add(what)
    try:
        yield
    finally:
        _active.discard(what)
