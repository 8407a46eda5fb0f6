"""Where CUDA's run-time compiler lies: in the packages that CUDA builds of torch bring along."""

from __future__ import annotations

import sys
from pathlib import Path

from funicular import _core

__all__ = ["tell_core"]


def tell_core() -> None:
    """Tell the core, which looks in the system's folders by itself."""
    found = [
        str(library)
        for root in dict.fromkeys(sys.path)
        if root and Path(root, "nvidia").is_dir()
        for library in sorted(Path(root, "nvidia").glob("*/lib/libnvrtc.so.*"))
        if ".alt." not in library.name
    ]
    _core.search_compiler(found)
