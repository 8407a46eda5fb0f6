"""The command line: ``python -m funicular`` and the ``funicular`` script run the same code as the Rust binary."""

from __future__ import annotations

import sys

from funicular import _core
from funicular._compiler import tell_core


def main() -> int:
    """Run the command line on this process's arguments.

    Returns
    -------
    int
        The exit status: 0 on success.
    """
    tell_core()
    return _core.cli(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
