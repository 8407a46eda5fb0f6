"""What ranks on GPUs have beside those on the host: connections that can be ended, and a stream for exchanges.

A kernel of NCCL that waits for a rank which has failed holds the GPU, and with it each call that waits for the GPU, until NCCL's own time limit. The
connections are the model's own, so that they can be ended as soon as the model has failed; those of the program stay.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from funicular import _core
from funicular.errors import Error
from funicular.torch_internals.process_groups import abort, environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from funicular._core import Engine

__all__ = ["Beside", "Guard", "connect", "free_memory"]

#: seconds between two looks for a failure
_LOOK = 0.2
#: seconds that the end of a model waits for that of its connections
_END = 10.0


def connect(members: list[int], device: torch.device, patience: timedelta) -> Any:
    """Return a group of NCCL between the GPUs of these ranks, connected. All of them call it."""
    # Broken connections of this group end no process, as torch's watchdog would: the rank that is left is to say what has happened.
    with environment("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"):
        group = dist.new_group(members, backend="nccl", timeout=patience, use_local_synchronization=True)
    with torch.cuda.device(device):
        # Only a collective connects all of them: an exchange may leave some out.
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        # Each pair in both directions: the first bytes of a direction hold the thread until the other rank's thread comes, too.
        others = [rank for rank in members if rank != dist.get_rank()]
        here, there = torch.zeros(1, device=device), [torch.zeros(1, device=device) for _ in others]
        ops = [dist.P2POp(dist.isend, here, rank, group) for rank in others]
        ops += [dist.P2POp(dist.irecv, one, rank, group) for one, rank in zip(there, others, strict=True)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        torch.cuda.synchronize()
    return group


def free_memory(device: torch.device) -> float:
    """Return the bytes that torch could still give to tensors on a GPU, if no other program takes them. The host's are not asked for."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + kept)


class Guard:
    """Ends connections between GPUs once the model has failed."""

    def __init__(self, runtime: Engine, group: Any) -> None:
        self._closed, self._ended = threading.Event(), threading.Event()
        # It must not keep the model, nor the process.
        look = (weakref.ref(self), self._closed, self._ended, runtime, group)
        self._thread = threading.Thread(target=_guard, args=look, name="funicular-guard", daemon=True)
        self._thread.start()

    def close(self) -> bool:
        """End looking. False if the connections were ended, or are about to be."""
        self._closed.set()
        # Python must not end while torch's code, which does not expect that, returns to the thread.
        if threading.current_thread() is not self._thread:  # where the garbage collector ends the model
            self._thread.join(_END)
        return not self._ended.is_set()


def _guard(
    guard: weakref.ref[Guard], closed: threading.Event, ended: threading.Event, runtime: Engine, group: Any
) -> None:
    last = False
    while not last:
        last = closed.wait(_LOOK) or guard() is None
        try:
            failed = _core.has_failed(runtime)
        except Error:
            return  # it is closed
        if failed:
            ended.set()
            with contextlib.suppress(RuntimeError, ValueError):  # the program has ended it
                abort(group)
            return


class Beside:
    """A stream for exchanges beside backward; the computing one waits for those of earlier units alone. On the host there is none."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._device = device
        #: the end of each exchange, and the gradients that it reads
        self._under_way: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    @contextlib.contextmanager
    def exchange(self, used: list[torch.Tensor]) -> Iterator[None]:
        """Have an exchange of these gradients beside what is computed from now on."""
        if self._stream is None:
            yield
            return
        compute = torch.cuda.current_stream(self._device)
        self._let_go(compute, _core.EXCHANGES_UNDER_WAY - 1)
        self._stream.wait_stream(compute)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._under_way.append((self._stream.record_event(), used))

    def join(self) -> None:
        """Have what is computed from now on see all exchanges."""
        if self._stream is not None:
            self._let_go(torch.cuda.current_stream(self._device), 0)

    def _let_go(self, compute: torch.cuda.Stream, left: int) -> None:
        while len(self._under_way) > left:
            event, _ = self._under_way.popleft()
            compute.wait_event(event)
