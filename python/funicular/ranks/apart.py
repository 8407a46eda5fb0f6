"""Calls of torch that block their thread, made in a thread of their own, so that the caller's wait for them can be interrupted."""

from __future__ import annotations

import atexit
import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Apart"]

_R = TypeVar("_R")
#: seconds between two looks at what ends the wait
_LOOK = 0.05
#: seconds that the end of Python waits for a call that was left
_END = 5.0


class Apart:
    """A thread that makes one call after another, in the order in which they are given."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        #: a wait for a call has ended before the call: the thread may be in it for ever
        self.left = False

    def run(self, call: Callable[[], _R], look: Callable[[], None]) -> _R:
        """Make a call and wait for it. ``look`` is asked again and again meanwhile: what it raises ends the wait, as signals do."""
        if self._thread is None:
            # A daemon: a call that does not end must not keep the process.
            self._thread = threading.Thread(target=self._work, name="funicular-calls", daemon=True)
            self._thread.start()
        done = threading.Event()
        found: list[Any] = []
        failed: list[BaseException] = []

        def make() -> None:
            try:
                found.append(call())
            except BaseException as error:
                failed.append(error)
            done.set()

        try:
            self._calls.put(make)
            while not done.wait(_LOOK):
                look()
        except BaseException:
            self.left = True
            # Python must not end while torch's code, which does not expect that, returns to it. The call ends with the ranks that it waits for.
            atexit.register(done.wait, _END)
            raise
        if failed:
            raise failed[0]
        return found[0]  # type: ignore[no-any-return]

    def _work(self) -> None:
        while True:
            self._calls.get()()
