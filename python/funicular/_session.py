"""One offloaded model: opens and closes windows, guards homes, brings gradients down.

Invariants:

- W1: outside its window a parameter is a view of its home; the home is valid and current once ``access`` has returned.
- W2: frames are given up only when nothing but the runtime's own views looks at them (the storage's use count says so),
  so whatever autograd or the user still holds stays right.
- W3: where the frames are held by others, a unit is used from its home: slower, never wrong.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from funicular import _core, _testing
from funicular._ahead import Ahead
from funicular._clip import MAX_FACTORS, apply_pending, note_norm
from funicular._ends import leave, living
from funicular._errors import Error, RuntimeFailure, UsageError
from funicular._guard import GuardedGrad, GuardedParameter
from funicular._leases import LeaseHooks
from funicular._log import StepLog
from funicular._model import (
    READING,
    ParamRef,
    Unit,
    bits_of,
    in_backward,
    link,
    outdate,
    ref_of,
    storage_uses,
    stream_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from funicular._core import Engine, Save
    from funicular.policy import Policy

__all__ = ["BACKWARD", "EVAL", "FORWARD", "Session"]

FORWARD, BACKWARD, EVAL = 0, 1, 2

_R = TypeVar("_R")
_log = logging.getLogger("funicular")


def _locked(method: Callable[..., _R]) -> Callable[..., _R]:
    @functools.wraps(method)
    def wrapper(self: Session, *args: Any, **kwargs: Any) -> _R:
        with self.lock:
            return method(self, *args, **kwargs)

    return wrapper


class Session:
    """State of one offloaded model on the Python side."""

    def __init__(self, engine: Engine, device: torch.device, policy: Policy) -> None:
        self.engine = engine
        self.policy = policy
        self.log = StepLog(engine, policy.to_dict())
        self.device = device
        self.units: list[Unit] = []
        #: parameters that are not paged: they live on the compute device
        self.residents: list[torch.nn.Parameter] = []
        self.ahead = Ahead()
        self.leases = LeaseHooks()
        #: everything hung on the model: each has ``remove()``
        self.handles: list[Any] = []
        self.pid = os.getpid()
        #: several threads may run the model at once; windows are opened and closed by one at a time
        self.lock = threading.RLock()
        self.started = time.monotonic()
        self.first_window = 0.0
        self.last_step = 0.0
        #: a step waits for its updates where they compete with the forward for the same cores and nothing comes from NVMe
        self.waits = False
        self.strays = 0
        #: clipping was seen: norms are taken as gradients come
        self.wants_norms = False
        #: factors pending for the next step
        self._factors: dict[int, torch.Tensor] = {}
        #: gradients on their way down, kept until their copies are over; the number of the copy comes second
        self._landing: deque[list[Any]] = deque()
        self._arrived: ParamRef | None = None
        self._task = -1
        self.closed = False
        #: the save under way, or the last one
        self.saving: Save | None = None
        #: why the model must not be used: a load that failed halfway
        self.partial = ""
        living.add(self)

    def __del__(self) -> None:
        """Leave what somebody still holds as ordinary tensors, and give the rest back."""
        if not self.closed and os.getpid() == self.pid:
            with contextlib.suppress(Error):
                _core.saved(self.engine)
            for unit in self.units:
                with contextlib.suppress(Error):
                    leave(self, unit)
        for unit in self.units:
            unit.params.clear()
            unit.neighbours.clear()
        self.engine.close()

    # A copied or pickled model is an ordinary one.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def stream(self) -> int:
        """Raw handle of the caller's compute stream."""
        return stream_of(self.device)

    # ------------------------------------------------------------------ windows

    @_locked
    def open(self, unit: Unit, phase: int) -> bool:
        """Bring a unit's parameters to their frames; False if they must be used from their home."""
        if unit.is_open and not unit.moving:
            return True
        self.alive()
        if unit.moving:
            self._go_home(unit)
        self.first_window = self.first_window or time.monotonic()
        self._before_use(unit)
        for other in unit.neighbours:
            if other.held and other.depth == 0:
                self.close(other)
        # First, so that whatever strikes in between leaves something to be put right.
        unit.held = unit.moving = True
        if not self.engine.open(unit.engine_id, phase, self.stream()):
            unit.held = unit.moving = False
            self._use_home(unit)
            return False
        for ref in unit.params:
            ref.param.__class__ = nn.Parameter
            ref.param.data = ref.frame
        unit.is_open, unit.moving = True, False
        return True

    def _use_home(self, unit: Unit) -> None:
        stream = self.stream()
        self.engine.settle(unit.engine_id, stream)
        self._fault_in([unit])

    @_locked
    def close(self, unit: Unit) -> None:
        """Bring the parameters home and give the frames up, as far as nobody looks at them."""
        if unit.is_open or unit.moving:
            # Autograd or the user holds a view: the bytes must stay. In backward so must the parameters.
            if unit.frame_in_use() and in_backward():
                return
            self._go_home(unit)
        if unit.held and not unit.frame_in_use():
            self.engine.release(unit.engine_id, self.stream())
            unit.held = False

    def _go_home(self, unit: Unit) -> None:
        """Bring edits home, then the parameters. Interrupted, it can be run again."""
        unit.moving = True
        away = []
        with torch._C.DisableTorchFunctionSubclass():
            for ref in unit.params:
                p = ref.param
                if ref.numel > 0 and p.data_ptr() == ref.home.data_ptr():
                    continue
                away.append(ref)
                if p._version != ref.version:
                    ref.edited = unit.dirty = True
                if ref.numel > 0 and p.data_ptr() != ref.frame_address:
                    unit.dirty = True
                    self._take_replacement(ref, p.data)
            if unit.dirty:
                self._make_room([unit])
                self.engine.write_back(unit.engine_id, self.stream())
                unit.dirty = False
            for ref in away:
                ref.version = ref.param._version
                ref.param.data = ref.home
        for ref in unit.params:
            ref.param.__class__ = GuardedParameter
        unit.is_open = unit.moving = False

    def _take_replacement(self, ref: ParamRef, data: torch.Tensor) -> None:
        """Carry out ``p.data = t`` inside a window, where no guard saw it."""
        self.check_replacement(ref, data)
        with torch.no_grad():
            ref.frame.copy_(data)
            ref.param.data = ref.frame
        ref.edited = True

    @_locked
    def close_all(self) -> None:
        """Close what is not in use: at the end of a backward, and before a step."""
        for unit in self.units:
            if unit.held and unit.depth == 0:
                self.close(unit)

    def open_for_backward(self, unit: Unit) -> bool:
        """Open a unit whose saved tensors are needed now; False: use the home's bytes."""
        if _testing.broken("skip_backward_reload"):
            return True
        return self.open(unit, BACKWARD)

    def _watch_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.backward_ended)

    @_locked
    def recover(self) -> None:
        """Close what an interrupted forward left open."""
        for unit in self.units:
            if unit.moving and unit.depth == 0:
                self.close(unit)
        self.close_all()

    # ------------------------------------------------------------------ homes

    @_locked
    def access(self, refs: list[ParamRef], *, alias: bool = False) -> None:
        """Make the homes of parameters valid and current for the caller, outside their windows."""
        self.alive()
        units = dict.fromkeys(ref.unit for ref in refs)
        for unit in units:
            if unit.moving:
                self._go_home(unit)
        if in_backward() and not alias:
            units = dict.fromkeys(u for u in units if u.depth > 0 or not self.open(u, BACKWARD))
        self.strays += len(units)
        for unit in units:
            if self.saving is not None:
                # The caller may be about to edit it.
                _core.preserve(self.engine, unit.engine_id)
            self.engine.settle(unit.engine_id, self.stream())
        self._fault_in(units)
        if alias:
            # Edits through a raw alias leave no trace: compare with what it was, for as long as it may live.
            for ref in refs:
                ref.unit.escaped = True
                if ref.snapshot is None and ref.trainable:
                    ref.snapshot = ref.home.detach().clone()

    def access_grad(self, ref: ParamRef) -> None:
        """Make a gradient in its segment valid for the caller."""
        self.alive()
        self.engine.settle(ref.unit.engine_id, self.stream())
        self.engine.wait_gradients(self.stream())
        self.ahead.drop(self, ref.unit)
        apply_pending(ref)

    def take_factor(self, factor: torch.Tensor) -> bool:
        """Whether one more factor may stay pending until the next step."""
        if id(factor) not in self._factors and len(self._factors) >= MAX_FACTORS:
            return False
        self._factors[id(factor)] = factor
        return True

    def edited(self, ref: ParamRef) -> None:
        """Note that a parameter was edited in its home."""
        ref.edited = True
        outdate(ref.unit)
        if ref.unit.on_nvme:
            self.engine.store_shadow(ref.unit.engine_id, self.stream())
        self.engine.invalidate(ref.unit.engine_id, self.stream())
        # Last: until then the edit counts as not yet seen.
        with torch._C.DisableTorchFunctionSubclass():
            ref.version = ref.param._version

    def replace_data(self, ref: ParamRef, data: torch.Tensor) -> None:
        """Carry out ``p.data = t`` by copying into the home."""
        self.check_replacement(ref, data)
        if data.data_ptr() != ref.home.data_ptr():
            ref.version = -1  # not yet seen
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                ref.home.copy_(data)
            self.edited(ref)

    def check_replacement(self, ref: ParamRef, data: torch.Tensor) -> None:
        if data.shape != ref.home.shape or data.dtype != ref.home.dtype or data.device != ref.home.device:
            raise UsageError(
                "FN-E115",
                f"'{ref.name}' is offloaded as {tuple(ref.home.shape)} {ref.home.dtype} on {ref.home.device}; it cannot become "
                f"{tuple(data.shape)} {data.dtype} on {data.device}. Call funicular.unwrap(model) first, then change it.",
            )

    def _fault_in(self, units: Iterable[Unit]) -> None:
        """Read what lives on NVMe; what was read for earlier accesses makes room."""
        for unit in units:
            if unit.behind:
                self._catch_up(unit)
        missing = [unit for unit in units if unit.on_nvme and not unit.shadow_filled]
        if not missing:
            return
        self._make_room(units)
        for unit in missing:
            try:
                self.engine.fault_in(unit.engine_id)
                unit.shadow_filled = True
            except BaseException:
                self.engine.discard_shadow(unit.engine_id)
                raise

    def _make_room(self, units: Iterable[Unit]) -> None:
        """Give back the memory of earlier reads that nobody looks at any more, but not that of these units."""
        for unit in self.units:
            if unit.shadow_filled and unit.depth == 0 and unit not in units:
                self._take_edits(unit)
                self._retire_shadow(unit)

    def _retire_shadow(self, unit: Unit) -> None:
        read = any(unit in reading for reading in READING)
        if unit.shadow_filled and not unit.escaped and not read and not unit.home_aliased():
            unit.shadow_filled = False
            self.engine.discard_shadow(unit.engine_id)

    def _catch_up(self, unit: Unit) -> None:
        """Show an update of the home to those who look at it."""
        self.engine.settle(unit.engine_id, self.stream())
        if unit.on_nvme and unit.shadow_filled:
            # Somebody looks at the old bytes: bring the new ones under the same addresses.
            self.engine.refresh_shadow(unit.engine_id, self.stream())
        readable = unit.shadow_filled or not unit.on_nvme
        for ref in unit.params:
            if ref.snapshot is not None:
                ref.snapshot = ref.home.detach().clone() if readable else None
        unit.behind = False

    def _before_use(self, unit: Unit) -> None:
        """Take note of edits that went past the guard, before the frames are filled."""
        self._take_edits(unit)
        self._retire_shadow(unit)

    def _take_edits(self, unit: Unit) -> None:
        if unit.behind:
            self._catch_up(unit)
        with torch._C.DisableTorchFunctionSubclass():
            for ref in unit.params:
                if ref.param._version != ref.version:
                    self.edited(ref)
        if unit.escaped:
            aliased = unit.home_aliased()
            self._compare_aliased(unit, aliased)
            if unit.on_nvme:
                self.engine.store_shadow(unit.engine_id, self.stream())
            self.engine.invalidate(unit.engine_id, self.stream())
            unit.escaped = aliased

    def _compare_aliased(self, unit: Unit, aliased: bool) -> None:
        for ref in unit.params:
            if ref.snapshot is None:
                continue
            if not torch.equal(bits_of(ref.snapshot), bits_of(ref.home)):
                ref.edited = True
            ref.snapshot = ref.home.detach().clone() if aliased else None

    # ------------------------------------------------------------------ gradients

    @_locked
    def gradient_arrived(self, param: torch.Tensor) -> None:
        """Take note that autograd accumulated into ``param.grad``."""
        ref = ref_of(param)
        self._watch_backward()
        # One behind, so that the user's own hooks on the parameter have run.
        self._bring_down()
        self._arrived = ref

    def _bring_down(self) -> None:
        ref, self._arrived = self._arrived, None
        if ref is None or ref.grad is None:
            return
        p = ref.param
        with torch._C.DisableTorchFunctionSubclass():
            grad = p.grad
            if grad is ref.grad:
                self.ahead.arrived(ref)  # added to in its segment
                return
            if grad is None or grad.requires_grad or grad.layout != torch.strided:
                return
            if grad.dtype != ref.home.dtype or grad.device != ref.home.device or type(grad) is not torch.Tensor:
                return
            if _testing.broken("drop_gradient"):
                p.grad = self._home_grad(ref)
                return
            if grad.stride() != ref.home.stride():
                grad = torch.empty_like(ref.frame).copy_(grad)
            home = self._home_grad(ref)
            note_norm(ref, grad, home)
            size = grad.element_size()
            landing: list[Any] = [grad, None]
            self._landing.append(landing)  # before: nothing may free what is being copied
            landing[1] = self.engine.gradient(
                ref.unit.engine_id, ref.offset, grad.data_ptr(), ref.numel * size, self.stream()
            )
            p.grad = home
        self.ahead.arrived(ref)
        self._reap()

    def _home_grad(self, ref: ParamRef) -> torch.Tensor:
        """Return the tensor over the gradient's segment; what the user still holds of the last one keeps its values."""
        assert ref.grad is not None
        # The attribute, the argument of getrefcount, and nobody else.
        if sys.getrefcount(ref.grad) > 2:
            held = ref.grad
            self.access_grad(ref)
            with torch._C.DisableTorchFunctionSubclass():
                fresh = self.make_grad(ref)
                held.data = held.detach().clone()
            ref.grad = fresh
        return ref.grad

    def make_grad(self, ref: ParamRef) -> torch.Tensor:
        """Build the tensor over the gradient's segment."""
        flat = ref.unit.grad_flat
        assert flat is not None
        typed = flat[ref.offset : ref.offset + ref.numel * ref.home.element_size()].view(ref.home.dtype)
        view = torch.as_strided(typed, ref.home.size(), ref.home.stride(), typed.storage_offset())
        grad = view.as_subclass(GuardedGrad)
        link(grad, ref)
        return grad

    def _reap(self) -> None:
        while self._landing:
            seq = self._landing[0][1]
            if seq is None:  # interrupted; it may be under way
                self.engine.wait_gradients(self.stream())
            elif not self.engine.landed(seq):
                return
            self._landing.popleft()

    @_locked
    def backward_ended(self) -> None:
        """Run at the end of a backward: all gradients are in their segments for whoever looks."""
        self._bring_down()
        if not _testing.broken("wrong_gate"):
            self.engine.wait_gradients(self.stream())
        self._reap()
        self._task = -1
        self.ahead.backward_ended(self.units)
        self.close_all()

    # ------------------------------------------------------------------ steps

    @_locked
    def before_step(self, units: list[Unit]) -> list[Unit]:
        """Settle edits and aliases; returns the units whose homes somebody looks at, to be waited for."""
        self.alive()
        self._bring_down()
        self.close_all()
        watched = []
        for unit in units:
            self.engine.settle(unit.engine_id, self.stream())
            self._before_use(unit)
            if unit.shadow_filled or storage_uses(unit.home) > unit.home_idle:
                watched.append(unit)
        return watched

    @_locked
    def settle_edits(self) -> None:
        """Bring everything home, and take note of edits that went past the guard."""
        self._bring_down()
        self.recover()
        for unit in self.units:
            if unit.escaped:
                self.engine.settle(unit.engine_id, self.stream())
            self._take_edits(unit)

    def stepped(self, refs: list[ParamRef], watched: list[Unit]) -> None:
        """Bump versions. Interrupted, it can be run again."""
        with torch._C.DisableTorchFunctionSubclass():
            for ref in refs:
                torch.autograd.graph.increment_version(ref.param)
                ref.version = ref.param._version
                ref.edited, ref.stepped = False, True
            for unit in dict.fromkeys(ref.unit for ref in refs):
                outdate(unit)
        self._factors.clear()
        for unit in watched:
            unit.behind = True

    def after_step(self, watched: list[Unit]) -> None:
        """Let aliases of homes see the new values."""
        self.last_step = time.monotonic()
        self.log.stepped()
        for unit in watched:
            if unit.behind:
                self._catch_up(unit)

    def bring_home(self, refs: list[ParamRef]) -> None:
        """Make sure that the gradients to be used are the ones in their segments."""
        foreign = [(ref, ref.param.grad) for ref in refs if ref.grad is not None and ref.param.grad is not ref.grad]
        # One parameter's segment may be another's gradient: all are read before any is written.
        taken = [
            (ref, g.detach().clone() if ref_of(g) is not None else g.detach()) for ref, g in foreign if g is not None
        ]
        for ref, grad in taken:
            self.access_grad(ref)
            with torch._C.DisableTorchFunctionSubclass():
                assert ref.grad is not None
                ref.grad.copy_(grad)

    def before_accumulate(self, ref: ParamRef) -> None:
        """Autograd is about to add to a gradient that may still be on its way, or is yet to be multiplied."""
        if ref.param.grad is ref.grad:
            self.access_grad(ref)

    def drop_unused_states(self) -> None:
        """Give back the memory of optimizer states that were read and are not held any more."""
        for unit in self.units:
            for ref in unit.params:
                if ref.states is not None:
                    ref.states.drop_unused()

    def keep_states(self, ref: ParamRef) -> None:
        """Take the optimizer's states out of the runtime."""
        if ref.states is not None:
            ref.states.detach()

    # ------------------------------------------------------------------ life

    def alive(self) -> None:
        """Raise if the model cannot be used."""
        if self.closed:
            raise RuntimeFailure("FN-E104", "the model is no longer offloaded.")
        if self.partial:
            raise RuntimeFailure("FN-E410", f"{self.partial} Load a whole checkpoint; until then the model is not used.")
        if os.getpid() != self.pid:
            raise RuntimeFailure(
                "FN-E103",
                "the model was offloaded by the parent of this process. Use it there; in a child, load a copy.",
            )
