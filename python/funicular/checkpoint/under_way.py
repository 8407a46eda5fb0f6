"""The saves that are under way in this process, and where to."""

from __future__ import annotations

import atexit
import logging
import os
from typing import TYPE_CHECKING

from funicular.errors import Error
from funicular.report.log import Progress

if TYPE_CHECKING:
    from funicular import _core

__all__ = ["ended", "finish", "install", "prune", "started"]

_log = logging.getLogger("funicular")
#: where each goes, and the process that asked for it: a forked child has its parent's in this list, and may have its own
_running: dict[_core.Save, tuple[str, int]] = {}


def _place(path: str | os.PathLike[str]) -> str:
    """Return what two paths to one place have in common; a path that leads nowhere is refused by those who open it."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return os.fspath(path)


def started(core: _core.Save, path: str | os.PathLike[str]) -> None:
    """Take note of a save."""
    _running[core] = (_place(path), os.getpid())


def ended(core: _core.Save) -> None:
    """Forget a save that has ended."""
    _running.pop(core, None)


def prune() -> None:
    """Forget all saves that have ended."""
    for core in [core for core, _ in _ours() if core.done()]:
        ended(core)


def _ours() -> list[tuple[_core.Save, str]]:
    return [(core, to) for core, (to, process) in list(_running.items()) if process == os.getpid()]


def finish(path: str | os.PathLike[str]) -> None:
    """Wait for the saves of this process to a path that is about to be read: what is read is the last state saved."""
    place = _place(path)
    for core in [core for core, to in _ours() if to == place]:
        try:
            with Progress("FN-I403 waiting for the save to %s before it is read", path) as told:
                while core.wait(told.pause) is None:
                    told.at(*core.progress())
        except Error as error:
            _log.warning("FN-W404 the last save to %s failed, an earlier checkpoint is read: %s", path, error)


def _finish_all() -> None:
    """Let saves that were asked for end: the process leaves nothing half done."""
    for one, _ in _ours():
        try:
            with Progress("FN-I403 waiting for a save before the process ends") as told:
                while one.wait(told.pause) is None:
                    told.at(*one.progress())
        except Error as error:
            _log.error("%s", error)
        except KeyboardInterrupt:
            one.cancel()


def install() -> None:
    """Have the process wait for its saves before it ends."""
    atexit.register(_finish_all)
