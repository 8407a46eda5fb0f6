"""Where CUDA's run-time compiler lies: in the packages that CUDA builds of torch bring along."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from funicular import _core

__all__ = ["tell_core"]


def tell_core() -> None:
    """Tell the core, which looks in the system's folders by itself."""
    found: list[str] = []
    for root in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError):  # an entry that cannot be read holds no package either
            libraries = sorted(Path(root, "nvidia").glob("*/lib/libnvrtc.so.*")) if root else []
            found += [str(library) for library in libraries if ".alt." not in library.name]
    _core.search_compiler(found)
