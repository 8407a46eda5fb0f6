"""Running a child under a real memory limit: a group below this process's own, version 1 or 2."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import forks

_ROOT = Path("/sys/fs/cgroup")


def _own() -> tuple[Path, str]:
    """This process's memory group, and the name of the file with its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _ROOT / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return _ROOT / line[3:].lstrip("/"), "memory.max"
    pytest.skip("this process is in no memory cgroup")


@contextlib.contextmanager
def limited(size: int) -> Iterator[Path]:
    """Make a group that may use ``size`` bytes."""
    own, limit = _own()
    group = own / f"funicular-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        if not (group / limit).exists():
            # Version 2 hands a controller down only from a group without processes of its own.
            (own / "cgroup.subtree_control").write_text("+memory")
        (group / limit).write_text(str(size))
    except OSError as e:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"cgroups cannot be made here: {e}")
    try:
        yield group
    finally:
        group.rmdir()


def run(group: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in the group, as a fork: what torch takes for itself is not the group's."""
    enter = f"import os, sys\nsys.argv[1:] = {list(arguments)!r}\nopen({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with forks.python(enter + code, **pipes) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_whole(group: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in the group, with all that torch takes."""

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=enter, check=False)
