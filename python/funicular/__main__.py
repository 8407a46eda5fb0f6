"""The command line: ``python -m funicular`` and the ``funicular`` script run the same code as the Rust binary."""

from __future__ import annotations

import signal
import sys

from funicular import _core
from funicular.torch_internals.nvrtc import tell_core


def main() -> int:
    """Run the command line on this process's arguments.

    Returns
    -------
    int
        The exit status: 0 on success.
    """
    tell_core()
    # The core handles Ctrl-C itself; Python's handler would add a KeyboardInterrupt to its exit status.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return _core.cli(sys.argv)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
