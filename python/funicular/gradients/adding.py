"""Where backwards are: which gradients they are about to add to, so that other threads leave those alone.

Autograd adds to a gradient between two hooks of its parameter, in C++, and the user's hooks run after the second one. Until the sum is there, the tensor
has to stay the parameter's gradient, and its memory where it is. So nothing is brought to its place that another backward is at: the one that leaves it
last brings it there.
"""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["Backwards"]


class _Backward:
    """A backward under way, and the gradient that it is at."""

    __slots__ = ("brings", "came", "coming", "ending", "thread")

    def __init__(self, ending: Any, failed: Callable[[Any], None] | None) -> None:
        self.thread = get_ident()
        #: what autograd calls at its end, and drops if it fails
        self.ending = weakref.ref(ending, failed)
        #: it brings gradients to parameters
        self.brings = False
        #: the gradient that it is about to add to
        self.coming: PagedParam | None = None
        #: the one that it has added to last, and whose other hooks may be running
        self.came: PagedParam | None = None

    @property
    def has_failed(self) -> bool:
        """Whether autograd has dropped what it would call at the end."""
        return self.ending() is None


class Backwards:
    """The backwards under way over one model, by the number that autograd gives them. Used with the session's lock held."""

    def __init__(self) -> None:
        self._living: dict[int, _Backward] = {}
        #: gradients that backwards were at when they ended, or failed
        self._left: list[PagedParam] = []

    def begin(self, task: int, ending: Any, failed: Callable[[Any], None] | None = None) -> None:
        """Take note of a backward, and of what autograd calls at its end. ``failed`` is called at once if it fails, without the lock."""
        self.prune()
        self._living[task] = _Backward(ending, failed)

    def prune(self) -> None:
        """Forget backwards that have failed."""
        for task in [task for task, backward in self._living.items() if backward.has_failed]:
            self.end(task)

    def end(self, task: int) -> None:
        """Take note that a backward is over."""
        backward = self._living.pop(task, None)
        if backward is not None and backward.came is not None:
            self._left.append(backward.came)

    def __contains__(self, task: int) -> bool:
        backward = self._living.get(task)
        return backward is not None and not backward.has_failed

    def __bool__(self) -> bool:
        return bool(self._living)

    @property
    def all_failed(self) -> bool:
        """Whether none is under way. May be asked without the lock."""
        return all(backward.has_failed for backward in list(self._living.values()))

    @property
    def pending(self) -> bool:
        """Whether :meth:`passed` may have something to return."""
        return bool(self._living or self._left)

    def of_thread(self, thread: int) -> bool:
        """Whether any of them runs in a thread."""
        return any(backward.thread == thread for backward in self._living.values())

    def bring(self, task: int) -> None:
        """Take note that a backward brings gradients."""
        if task in self._living:
            self._living[task].brings = True

    def brings(self, task: int) -> bool:
        """Whether a backward under way brings gradients."""
        return task in self._living and self._living[task].brings

    # ------------------------------------------------------------------ the gradients that they are at

    def about_to_add(self, task: int, ref: PagedParam) -> None:
        """Take note that a backward is about to add to a gradient."""
        if task in self._living:
            self._living[task].coming = ref

    def added(self, task: int, ref: PagedParam) -> None:
        """Take note that a backward has added to a gradient."""
        if task in self._living:
            self._living[task].coming, self._living[task].came = None, ref

    def passed(self) -> list[PagedParam]:
        """Take the gradients that this thread was at, and those that ended backwards have left: their hooks have all run."""
        self.prune()
        me = get_ident()
        found, self._left = self._left, []
        for backward in self._living.values():
            if backward.thread == me and backward.came is not None:
                found.append(backward.came)
                backward.came = None
        return found

    def adds_to(self, ref: PagedParam) -> bool:
        """Whether a backward is about to add to a gradient: until it has, nothing may ask for it, since autograd sets it without the GIL."""
        return any(backward.coming is ref for backward in self._under_way())

    def at(self, ref: PagedParam) -> bool:
        """Whether a backward is about to add to a gradient, or another thread's has just added to it."""
        me = get_ident()
        return any(
            backward.coming is ref or (backward.came is ref and backward.thread != me) for backward in self._under_way()
        )

    def adds_within(self, unit: Unit) -> bool:
        """Whether a backward is about to add to a gradient of a unit."""
        return any(backward.coming is not None and backward.coming.unit is unit for backward in self._under_way())

    def _under_way(self) -> Iterator[_Backward]:
        return (backward for backward in self._living.values() if not backward.has_failed)
