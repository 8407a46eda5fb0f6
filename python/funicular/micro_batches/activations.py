"""Block inputs that wait for their backward in page-locked host memory of the runtime's own.

Copies run on two streams beside the compute stream, ordered by events; nothing here waits on the host. On the host device
a copy is a copy. Invariants:

- A tensor on its way down lives until the compute stream has been told to wait for its copy.
- A buffer of the device is filled again only behind the work that was enqueued with it, and never while other code holds it.
- Host memory is written again only behind the last copy that read it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from funicular.micro_batches.arena import Arena
from funicular.torch_internals.memory import storage_uses

if TYPE_CHECKING:
    from funicular._core import Engine

__all__ = ["Activations", "Paged"]

#: tensors that stay on the device behind their copy: the last of a forward are the first that its backward needs
_NEAR = 2


class Activations:
    """All paged block inputs of one model."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.device = device
        self.arena = Arena(engine, device)
        self.bytes_out = 0
        self.bytes_in = 0
        self._cuda = device.type == "cuda"
        self._near: deque[Paged] = deque()
        #: what waits, oldest first; a backward goes from the end
        self._waiting: list[weakref.ref[Paged]] = []
        self._buffers: list[_Buffer] = []
        if self._cuda:
            stream: Any = torch.cuda.Stream
            self.down, self.up = stream(device), stream(device)

    def keep(self, x: torch.Tensor, bounds: list[tuple[int, int]]) -> Paged | None:
        """Start copying a tensor to host memory; None for one that stays where it is because it is not contiguous.

        Raises
        ------
        BudgetError
            ``FN-E202`` where ``budget.host`` has no room for it.
        """
        if not x.is_contiguous() or x.numel() == 0 or x.device != self.device:
            return None
        paged = Paged(self, x, bounds)
        with torch.no_grad():
            if self._cuda:
                self._copy_down(paged, x)
            else:
                paged.host.copy_(x)
        self.bytes_out += x.nbytes
        self._waiting.append(weakref.ref(paged))
        return paged

    def _copy_down(self, paged: Paged, x: torch.Tensor) -> None:
        compute = torch.cuda.current_stream(self.device)
        self.down.wait_stream(compute)
        self.down.wait_stream(self.up)  # host memory that is used again may still be read
        with torch.cuda.stream(self.down):
            paged.host.copy_(x.detach(), non_blocking=True)
            paged.arrived = self.down.record_event()
        paged.near = (x.detach(), x._version)
        self._near.append(paged)
        while len(self._near) > _NEAR:
            self._near.popleft().let_go()

    def before(self, paged: Paged) -> Paged | None:
        """Return what started to wait just before another; a guess at what is needed next."""
        self._waiting = [ref for ref in self._waiting if (p := ref()) is not None and not p.dropped]
        living = [ref() for ref in self._waiting]
        at = living.index(paged) if paged in living else 0
        return living[at - 1] if at > 0 else None

    def buffer(self, nbytes: int) -> _Buffer:
        """Return a buffer of the device that is not in use; work enqueued on the up stream from here on may fill it."""
        for b in self._buffers:
            if not b.busy and b.bytes.nbytes >= nbytes:
                b.busy = True
                if storage_uses(b.bytes.untyped_storage()) > b.idle:
                    b.renew()
                elif b.free is not None:
                    self.up.wait_event(b.free)
                return b
        fresh = _Buffer(nbytes, self.device, self.up)
        self._buffers.append(fresh)
        return fresh

    def totals(self) -> tuple[int, int, int, int]:
        """Return bytes copied out, copied in, waiting, and taken from the host budget."""
        return self.bytes_out, self.bytes_in, self.arena.in_use, self.arena.reserved

    def __del__(self) -> None:
        """Wait for all copies: their memory is about to be given back."""
        with contextlib.suppress(Exception):
            if self._cuda:
                self.down.synchronize()
                self.up.synchronize()


class _Buffer:
    """Memory of the device for a slice."""

    def __init__(self, nbytes: int, device: torch.device, up: torch.cuda.Stream) -> None:
        self._device, self._up = device, up
        self.busy = True
        #: recorded on the compute stream behind the last work with the buffer
        self.free: torch.cuda.Event | None = None
        self._take(nbytes)

    def _take(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # Its memory may have been another tensor's, with work under way.
        self._up.wait_stream(torch.cuda.current_stream(self._device))
        self.idle = storage_uses(self.bytes.untyped_storage())

    def renew(self) -> None:
        """Leave the memory to the tensors that still hold it, and take other memory."""
        self._take(self.bytes.nbytes)


class Paged:
    """One tensor in host memory, asked for slice by slice, the last slice first."""

    def __init__(self, owner: Activations, x: torch.Tensor, bounds: list[tuple[int, int]]) -> None:
        self.dropped = True
        self._owner, self._bounds = owner, bounds
        self._place = owner.arena.take(x.nbytes)
        self.host = self._place.bytes.view(x.dtype).view(x.shape)
        #: on a device with streams: recorded behind the copy down
        self.arrived: torch.cuda.Event | None = None
        #: the tensor itself, and its version when it was copied
        self.near: tuple[torch.Tensor, int] | None = None
        self._ready: dict[int, tuple[_Buffer, torch.Tensor, torch.cuda.Event]] = {}
        self.dropped = False

    def rows(self, index: int) -> torch.Tensor:
        """Return a slice on the device, for work that is enqueued on the current stream."""
        start, stop = self._bounds[index]
        part = self.host.narrow(0, start, stop - start)
        if self.arrived is None:
            self._owner.bytes_in += part.nbytes
            return part.clone()
        self.ahead(index)
        if index in self._ready:
            _, rows, event = self._ready[index]
            torch.cuda.current_stream(self._owner.device).wait_event(event)
        else:
            assert self.near is not None
            rows = self.near[0].narrow(0, start, stop - start)
        # While this slice computes, the next one comes up.
        if index > 0:
            self.ahead(index - 1)
        else:
            other = self._owner.before(self)
            if other is not None:
                other.ahead(len(other._bounds) - 1)
        return rows

    def ahead(self, index: int) -> None:
        """Start copying a slice up, unless that was done."""
        if self.arrived is None or index in self._ready or self.dropped:
            return
        if self.near is not None and self.near[0]._version == self.near[1]:
            return
        start, stop = self._bounds[index]
        part = self.host.narrow(0, start, stop - start)
        buffer = self._owner.buffer(part.nbytes)
        rows = buffer.bytes[: part.nbytes].view(part.dtype).view(part.shape)
        up = self._owner.up
        up.wait_event(self.arrived)
        with torch.no_grad(), torch.cuda.stream(up):
            rows.copy_(part, non_blocking=True)
            self._ready[index] = (buffer, rows, up.record_event())
        self._owner.bytes_in += part.nbytes

    def used(self, index: int) -> None:
        """Note that all work with a slice is enqueued."""
        ready = self._ready.pop(index, None)
        if ready is not None:
            ready[0].free = torch.cuda.current_stream(self._owner.device).record_event()
            ready[0].busy = False

    def let_go(self) -> None:
        """Give up the tensor itself: the compute stream waits for the copy, then its memory may become another's."""
        if self.near is not None and self.arrived is not None:
            torch.cuda.current_stream(self._owner.device).wait_event(self.arrived)
            self.near = None

    def drop(self) -> None:
        """Give the host memory back."""
        if not self.dropped:
            self.let_go()
            self.dropped = True
            for buffer, _, event in self._ready.values():
                buffer.free, buffer.busy = event, False
            self._ready.clear()
            self._owner.arena.give(self._place)

    def __del__(self) -> None:
        self.drop()
