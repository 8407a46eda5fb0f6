"""Scripts in processes of their own: for limits, signals, mounts, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
#: Seconds after which a process hangs. Starting one takes half a minute where eight others want the processor.
PATIENCE = 400

PRELUDE = """
import os, signal, sys, threading, time
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path[:0] = [{here!r}]
import torch
torch.set_num_threads(1)
import funicular
from models import WIDTH, Decoder, Stack
from twin import Run, World, merge
disk = {disk!r}
world = World({device!r}, (disk,), **{placement!r})
"""


def start(
    body: str, disk: str, placement: dict[str, str], device: str = "host", prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a script that finds ``funicular``, the models, ``world`` and ``disk``."""
    code = PRELUDE.format(here=str(HERE), disk=disk, device=device, placement=dict(placement)) + textwrap.dedent(body)
    return subprocess.Popen(
        [*prefix, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
    )


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Status and output; a process that hangs is killed, and that is a failure."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, err = process.communicate()
        raise AssertionError(f"still running after {seconds} s\n{err}") from None
    return process.returncode, out, err


def succeed(
    body: str,
    disk: str,
    placement: dict[str, str],
    device: str = "host",
    prefix: Sequence[str] = (),
    seconds: float = PATIENCE,
) -> list[str]:
    """Run a script that must end well; its lines."""
    status, out, err = finish(start(body, disk, placement, device, prefix), seconds)
    assert status == 0, f"status {status}\n{out}\n{err}"
    assert "panicked" not in err, err
    return out.splitlines()
