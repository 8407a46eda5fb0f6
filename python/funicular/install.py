"""What using the package does to the process besides defining names: all of it, in one function that works once."""

from __future__ import annotations

from funicular.checkpoint import under_way
from funicular.guard import classes
from funicular.report import log
from funicular.torch_internals import compiling, saved_hooks
from funicular.windows import faults, moved_by_others, shutdown

__all__ = ["install"]

_done: list[bool] = []


def install() -> None:
    """Tell torch of the package's classes, have lines of the log printed and offloaded models not replicated, and have the process say when it forks and when it ends."""
    if _done:
        return
    _done.append(True)
    saved_hooks.install()
    classes.install()
    compiling.traced(classes.GuardedParameter, classes.WindowParameter, classes.GuardedGrad)
    log.install()
    moved_by_others.watch_replication()
    # What is registered last runs first at the end: saves that are under way end before the sessions that they read are closed.
    shutdown.install()
    under_way.install()
    faults.install()
