"""The saves that are under way in this process, and where to."""

from __future__ import annotations

import atexit
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from funicular.errors import Error
from funicular.report.log import progress

if TYPE_CHECKING:
    from funicular import _core

__all__ = ["ended", "finish", "install", "prune", "started"]

_log = logging.getLogger("funicular")
_running: dict[_core.Save, str] = {}
_pid = os.getpid()


def started(core: _core.Save, path: str | os.PathLike[str]) -> None:
    """Take note of a save."""
    _running[core] = str(Path(path).resolve())


def ended(core: _core.Save) -> None:
    """Forget a save that has ended."""
    _running.pop(core, None)


def prune() -> None:
    """Forget all saves that have ended."""
    for core in [core for core in _running if core.done()]:
        ended(core)


def finish(path: str | os.PathLike[str]) -> None:
    """Wait for the saves of this process to a path that is about to be read: what is read is the last state saved."""
    place = str(Path(path).resolve())
    for core in [core for core, to in list(_running.items()) if to == place and os.getpid() == _pid]:
        try:
            while core.wait(60.0) is None:
                progress("FN-I403 waiting for the save to %s before it is read: %d of %d bytes", path, *core.progress())
        except Error as error:
            _log.warning("FN-W404 the last save to %s failed, an earlier checkpoint is read: %s", path, error)


def _finish_all() -> None:
    """Let saves that were asked for end: the process leaves nothing half done."""
    if os.getpid() != _pid:
        return
    for one in list(_running):
        try:
            while one.wait(60.0) is None:
                progress("FN-I403 waiting for a save before the process ends: %d of %d bytes", *one.progress())
        except Error as error:
            _log.error("%s", error)
        except KeyboardInterrupt:
            one.cancel()


def install() -> None:
    """Have the process wait for its saves before it ends."""
    atexit.register(_finish_all)
