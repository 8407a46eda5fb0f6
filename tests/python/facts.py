"""The one place that knows the shape of ``funicular.stats`` and asks the system about memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import sysconfig
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import funicular
from funicular import testing
from models import CUDA

_ROOT = Path(__file__).parents[2]
#: where packages are installed: in the repository, if the environment is
_INSTALLED = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]


def budget(model: nn.Module, tier: str) -> tuple[int, int | None]:
    """Peak and limit of a tier in bytes, from the arenas' own counters."""
    entry = funicular.stats(model).budgets[tier]
    return entry.peak, entry.limit


def moved(model: nn.Module, link: str) -> int:
    """Bytes that crossed ``host_to_device``, ``device_to_host``, ``nvme_read`` or ``nvme_write``."""
    return funicular.stats(model).links[link].bytes


def saved_tensor_hooks() -> int:
    """Saved-tensor hooks on this thread's stack; 0 where no offloaded model lives."""
    return testing.saved_tensor_hooks()


def _is_ours(folder: Path) -> bool:
    """Whether a folder is the repository's own: torch's compiler adds some of packages to Python's path."""
    return folder.is_relative_to(_ROOT) and not any(folder.is_relative_to(installed) for installed in _INSTALLED)


def process() -> dict[str, Any]:
    """What of this process later work depends on."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    gradient = parameter.grad
    return {
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("FUNICULAR", "PYTHON", "LD_", "CUDA"))},
        "folder": str(Path.cwd()),
        "path": [folder for folder in sys.path if _is_ours(Path(folder))],
        "traced": (sys.gettrace(), sys.getprofile()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "references": (sys.getrefcount(gradient), torch.Tensor._use_count(gradient)),
        "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")],
        "cgroup": Path("/proc/self/cgroup").read_text(),
    }


def for_accelerate() -> dict[str, str]:
    """What the environment says to accelerate: whether to compile models, in which type to compute."""
    return {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE_")}


def restore(before: dict[str, Any]) -> None:
    """Give this thread back the state of torch's that :func:`process` found."""
    torch.set_grad_enabled(before["gradients"][0])
    torch.set_default_dtype(before["type"])
    torch.use_deterministic_algorithms(before["deterministic"])


def forget_backwards() -> None:
    """Have torch drop what a backward left behind that ended in an exception: nodes queued in this thread, until its next one."""
    torch.ones(1, requires_grad=True).sum().backward()


def forget_frames(error: BaseException | None) -> None:
    """Drop the local variables that an exception keeps alive, and those of the exceptions that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            _ = frame.f_locals  # a copy that was read before is kept with the frame: it is made anew
        error = error.__cause__ or error.__context__


def get_ahead(nodes: int = 1 << 17) -> None:
    """Give the next nodes of this thread's graphs higher numbers than those of other threads.

    Autograd adds up what comes to a node in the order of numbers that every thread counts for itself. In a second backward on a GPU
    nodes of its thread and of this one meet, so that the order, and with it the last bit, would depend on what ran before.
    """
    x = torch.ones(1, requires_grad=True)
    for _ in range(nodes):
        x.view(1)


def compile_sooner() -> None:
    """Spare torch's compiler to measure how long the guards of each function take, with caches that it empties for that: by 32 MB that it writes."""
    import torch._dynamo.guards

    if hasattr(torch._dynamo.guards, "profile_guard_manager"):
        torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pss(name: str) -> int:
    """Proportional bytes of the mappings whose file name contains ``name``; aliases of a page share it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if head and "-" in head[0] and not head[0].endswith(":"):
            inside = name in line
        elif inside and head[0] == "Pss:":
            total += int(head[1]) * 1024
    return total


def open_files() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def files(directory: str) -> list[str]:
    """Names of what lies in a directory."""
    return [p.name for p in Path(directory).iterdir()]


def thread_names() -> Counter[str]:
    """Threads of this process, by name, but for the kernel's own, which io_uring starts where a disk is slow and ends by itself."""
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # ended since
            found[(task / "comm").read_text().strip()] += 1
    return Counter({name: n for name, n in found.items() if not name.startswith("iou-")})


def threads() -> int:
    """How many those are; beside a GPU only the runtime's own, because its driver starts others when it likes."""
    return sum(n for name, n in thread_names().items() if not CUDA or name.startswith("funicular"))


def rest(seconds: float) -> None:
    """Give other threads the time that they get in so many seconds of a quiet machine: on a busy one more, unless all of them sleep sooner."""
    end = time.monotonic() + seconds * max(1.0, 4 * os.getloadavg()[0] / (os.cpu_count() or 1))
    time.sleep(seconds)
    quiet = 0
    while quiet < 6 and time.monotonic() < end:
        time.sleep(0.004)
        quiet = 0 if _others_run() else quiet + 1


def _others_run() -> bool:
    """Whether any other thread of this process runs, or wants to."""
    me = threading.get_native_id()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if int(task.name) != me and state in "RD":
                return True
    return False


def busy() -> tuple[float, float, float]:
    """Seconds of processor time that all programs have taken, those of this process and its children, and the clock."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / tick, sum(os.times()[:4]), time.monotonic()


def others_since(before: tuple[float, float, float]) -> float:
    """How many processors other programs have kept busy since then, on average."""
    everyone, own, clock = (now - then for now, then in zip(busy(), before, strict=True))
    return (everyone - own) / max(clock, 0.1)


def eventually(true: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for what other threads are about to do; an assertion error if they do not."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.01)


def all_pss() -> int:
    """Proportional bytes of the whole process but for its files: those of libraries change with who else has them open."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    found = {line.split()[0]: int(line.split()[1]) * 1024 for line in rollup.splitlines()[1:]}
    return found["Pss_Anon:"] + found["Pss_Shmem:"]


def disk_use(directory: str) -> int:
    """Bytes on disk of this process's open files under a directory, of which the data file has no name any more."""
    found = {}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            if str(fd.readlink()).startswith(directory):
                stat = fd.stat()
                found[stat.st_ino] = stat.st_blocks * 512
        except FileNotFoundError:  # the descriptor of this very listing
            pass
    return sum(found.values())
