"""What classes parameters have while their model is offloaded."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from funicular.guard.classes import GuardedParameter, WindowParameter

__all__ = ["guarded_classes"]


@functools.cache
def guarded_classes(cls: type) -> tuple[type[GuardedParameter], type[WindowParameter]]:
    """Return the classes of a parameter outside and inside its window; both are subclasses of the parameter's own class."""
    if cls is nn.Parameter:
        return GuardedParameter, WindowParameter
    names = {"__doc__": cls.__doc__, "__module__": __name__, "_funicular_class": cls}
    guarded: Any = type(cls)(f"Guarded{cls.__name__}", (GuardedParameter, cls), names)
    window: Any = type(cls)(f"Window{cls.__name__}", (WindowParameter, cls), names)
    return guarded, window
