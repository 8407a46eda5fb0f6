"""Scripts in processes of their own: for limits, signals, mounts, and ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import forks

HERE = Path(__file__).parent
#: where modules of the tests lie
FOLDERS = [str(HERE), *(str(folder) for folder in sorted(HERE.iterdir()) if folder.is_dir())]
#: Seconds after which a process hangs. Starting one takes half a minute where eight others want the processor.
PATIENCE = 400

PRELUDE = """
import os, signal, sys, threading, time
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path[:0] = {folders!r}
import torch
torch.set_num_threads(1)
import funicular
from models import WIDTH, Decoder, Stack
from twin import Run, World, merge
disk = {disk!r}
world = World({device!r}, (disk,), **{placement!r})
"""

#: Freed memory goes back to the system at once: what the C library would keep of it is in no plan.
EXACT = ("env", "MALLOC_MMAP_THRESHOLD_=65536")
#: A model of 64 MiB whose states, and weights, are on disk.
TRAINED = """
import gc, facts
def build():
    return Stack(block=lambda: __import__("models").Block(1024), depth=8, width=1024)
def train(model, opt, steps):
    for _ in range(steps):
        model(torch.ones(2, 1024)).square().mean().backward()
        opt.step()
        opt.zero_grad()
MIB = 1 << 20
HBM, HOST = 3 * 8 * MIB + 64 * 1024, 96 * MIB
def policy(model, **more):
    return merge(world.policy(model), {"budget": {"hbm": f"{HBM}B", "host": f"{HOST}B", "nvme": "1GiB"}, "debug": {"poison": False}} | more)
# What torch needs for itself, and is not given back: threads, pools, code.
warm = torch.nn.Linear(1024, 1024)
opt = funicular.AdamW(warm.parameters())
train(torch.nn.Sequential(warm), opt, 2)
del warm, opt
gc.collect()
# Gradients of two blocks on their way down, and of the one that computes, some of them transposed; code that is used for the first time.
BESIDE = 5 * 8 * MIB
"""


def program(
    code: str, device: str = "host", prefix: Sequence[str] = (), cwd: Path | None = None
) -> subprocess.Popen[str]:
    """Start Python code with pipes for its output: a fork, unless a GPU or a prefix forbids it."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    if prefix or device != "host":
        return subprocess.Popen([*prefix, sys.executable, "-c", code], **streams)
    return forks.python(code, **streams)


def start(
    body: str, disk: str, placement: dict[str, str], device: str = "host", prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start a script that finds ``funicular``, the models, ``world`` and ``disk``; after ``prefix``, if that is given."""
    code = PRELUDE.format(folders=FOLDERS, disk=disk, device=device, placement=dict(placement)) + textwrap.dedent(body)
    return program(code, device, prefix)


#: Has this process see mounts that no other one sees.
ALONE = """
import ctypes, subprocess
if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
    raise OSError(ctypes.get_errno(), "unshare")
subprocess.run(["sh", "-c", {mounts!r}], check=True)
"""


def behind(mounts: str, body: str, disk: str, placement: dict[str, str], device: str = "host") -> list[str]:
    """Run a script that must end well behind mounts that only it sees, which a shell makes; its lines."""
    mounts = f"mount --make-rprivate / && {mounts}"
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare")
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mounts], check=False, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"mounting is not possible here: {probe.stderr.strip()}")
    return succeed(ALONE.format(mounts=mounts) + textwrap.dedent(body), disk, placement, device)


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
    whole_end: bool = False,
) -> list[str]:
    """Run a script that must end well; its lines. Of a fork Python's own end is left out."""
    return lines(begin(body, disk, placement, device, prefix, whole_end), seconds)


def begin(
    body: str,
    disk: str,
    placement: dict[str, str],
    device: str = "host",
    prefix: Sequence[str] = (),
    whole_end: bool = False,
) -> subprocess.Popen[str]:
    """Start a script that must end well, for :func:`lines`."""
    body = textwrap.dedent(body)
    if not prefix and device == "host" and not whole_end:
        body += "\nimport forks\nforks.end()\n"
    return start(body, disk, placement, device, prefix)


def lines(process: subprocess.Popen[str], seconds: float = PATIENCE) -> list[str]:
    """What a script has printed that ended well."""
    status, out, err = finish(process, seconds)
    assert status == 0, f"status {status}\n{out}\n{err}"
    assert "panicked" not in err, err
    return out.splitlines()
