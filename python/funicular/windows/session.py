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
import os
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from funicular import _core
from funicular._core import BACKWARD
from funicular.errors import Error
from funicular.gradients.arrival import Landing, bring_down, move_out
from funicular.gradients.clipping import Clipping, apply_pending, recognised
from funicular.gradients.speculation import Speculation
from funicular.homes.digests import digest, look_at_frames, look_at_home, renew_home
from funicular.homes.edits import Inside, refresh_frames, take_edits, take_frame_edits
from funicular.homes.moved import check_places
from funicular.report.log import StepLog
from funicular.report.nvtx import ranges
from funicular.torch_internals.autograd import at_end_of_backward, backward_task, in_backward
from funicular.torch_internals.memory import stream_of
from funicular.torch_internals.overrides import unguarded
from funicular.units.unit import Access, PagedParam, Unit, ref_of
from funicular.windows.faults import adopt, fetch
from funicular.windows.leases import LeaseHooks
from funicular.windows.shutdown import check_alive, leave, living
from funicular.windows.signals import note_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from funicular._core import Engine, Save
    from funicular.policy import Policy

__all__ = ["Session"]

_R = TypeVar("_R")


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
        self.ranges = ranges(policy.log.nvtx, device)
        self.device = device
        self.units: list[Unit] = []
        #: parameters that are not paged: they live on the compute device
        self.residents: list[torch.nn.Parameter] = []
        self.speculation = Speculation(engine)
        self.leases = LeaseHooks()
        self.activations: Any = None  # see Activations: block inputs that wait in host memory, where the policy says so
        self.held: Any = None  # see Held: the model that was given to offload, and what it holds
        self.handles: list[Any] = []  # everything hung on the model: each has ``remove()``
        self.pid = os.getpid()
        #: several threads may run the model at once; windows are opened and closed by one at a time
        self.lock = threading.RLock()
        self.busy: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        #: the unit whose home was made current last, for a use that may be about to begin
        self.used: Unit | None = None
        #: takes note of a step that the runtime may have taken, until that is noted; it can be run again
        self.unnoted: Callable[[], None] | None = None
        self.poison = bool(policy.to_dict().get("debug", {}).get("poison"))
        self.started = time.monotonic()
        #: a step waits for its updates where they compete with the forward for the same cores and nothing comes from NVMe
        self.waits = False
        self.strays = 0
        self.clipping = Clipping()
        self.landing = Landing(engine)
        self._arrived: PagedParam | None = None
        self._task = -1
        self.closed = False
        #: the save under way, or the last one
        self.saving: Save | None = None
        #: why the model must not be used: a load that failed halfway
        self.partial = ""
        self.loading = False
        #: the caller knows of optimizer states that cannot be read
        self.told_lost = False
        living.add(self)

    def __del__(self) -> None:
        """Leave what somebody still holds as ordinary tensors, and give the rest back."""
        if "closed" not in self.__dict__:
            return  # interrupted while it was made
        self.held = None  # who else holds a parameter is counted below
        if not self.closed and os.getpid() == self.pid:
            with contextlib.suppress(Error):
                _core.saved(self.engine)
            for unit in self.units:
                with contextlib.suppress(Error):
                    leave(self, unit)
        for unit in self.units:
            unit.params.clear()
            unit.neighbours.clear()
        if os.getpid() == self.pid:
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
        if phase == BACKWARD:
            self.ranges.backward(unit.name)
        if unit.is_open and not unit.moving:
            self._let_in(unit)
            return True
        self.alive()
        if unit.moving:
            self._go_home(unit)
        self._before_use(unit)
        # In backward nothing else tells that a window has been passed; its frames are wanted for what comes next.
        for other in self.units if phase == BACKWARD else unit.neighbours:
            if other.held and other.depth == 0 and other is not unit:
                self.close(other)
        # First, so that whatever strikes in between leaves something to be put right.
        unit.held = unit.moving = True
        # Where another thread computes with the parameters, they must not move.
        if unit.is_used_by_others() or not self.engine.open(unit.engine_id, phase, self.stream()):
            unit.held = unit.moving = False
            self.use_home(unit)
            return False
        unit.frames_seen = None
        with unguarded():
            for ref in unit.params:
                ref.seen, ref.touched = digest(ref.frame) if self.poison else None, False
                ref.param.data = ref.frame
                ref.param.__class__ = ref.window
        self._let_in(unit)
        unit.is_open, unit.moving = True, False
        return True

    def _let_in(self, unit: Unit) -> None:
        unit.let_in()
        if in_backward():
            self._watch_backward()

    def use_home(self, unit: Unit) -> None:
        """Make a unit's home current, for use where its frames are not to be had."""
        self.used = unit
        stream = self.stream()
        self.engine.settle(unit.engine_id, stream)
        self._fault_in([unit])

    @_locked
    def close(self, unit: Unit, *, force: bool = False) -> None:
        """Bring the parameters home and give the frames up, as far as nobody looks at them.

        ``force`` also where another thread is inside.
        """
        if unit.is_open or unit.moving:
            # Autograd or the user holds a view: the bytes must stay. In backward so must the parameters.
            if in_backward() and unit.frame_in_use():
                return
            if unit.is_used_by_others() or (unit.has_others_inside() and not force):
                return
            self._go_home(unit)
        elif unit.held:
            take_frame_edits(self, unit)
        if unit.held and not unit.frame_in_use():
            self.engine.release(unit.engine_id, self.stream())
            unit.held = False
            unit.frames_seen = None
        elif unit.held:
            look_at_frames(unit)

    def _go_home(self, unit: Unit) -> None:
        """Bring edits home, then the parameters. Interrupted, it can be run again."""
        check_places(self.engine, unit)
        if unit.on_nvme:
            adopt(self, [unit])
        interrupted, unit.moving = unit.moving, True
        with unguarded():
            inside = Inside(self, unit)
            away = [ref for ref in unit.params if not interrupted or ref.numel == 0 or not ref.at_home()]
            for ref in away:
                inside.look(ref)
            for ref in inside.edited:
                ref.edited = unit.dirty = True
            if unit.dirty and not inside.elsewhere:
                self._make_room([unit])
                self.engine.write_back(unit.engine_id, self.stream())
                renew_home(unit, inside.edited)
            unit.dirty = False
            for ref in away:
                ref.version = ref.param._version
                ref.param.data = ref.home
                ref.param.__class__ = ref.guarded
                ref.seen = None
        unit.inside.clear()
        unit.is_open = unit.moving = False
        inside.end()

    @_locked
    def close_left(self, unit: Unit) -> None:
        """Close a window whose end found another thread's operation on the parameters under way."""
        if unit.is_open and not unit.inside and unit.depth == 0:
            self.close(unit)

    @_locked
    def close_all(self) -> None:
        """Close what is not in use: before a step, and where nothing of a forward is left."""
        for unit in self.units:
            if unit.held and unit.depth == 0:
                self.close(unit, force=True)

    def open_for_backward(self, unit: Unit) -> bool:
        """Open a unit whose saved tensors are needed now; False: use the home's bytes."""
        return self.open(unit, BACKWARD)

    def _watch_backward(self) -> None:
        task = backward_task()
        if task != self._task:
            self._task = task
            at_end_of_backward(functools.partial(self.backward_ended, task))

    @_locked
    def recover(self) -> None:
        """Close what this thread left open: nothing of a forward or backward is under way in it."""
        me = threading.get_ident()
        for unit in self.units:
            if unit.calls:
                unit.calls[:] = [call for call in unit.calls if call.thread != me]
            if unit.moving and unit.depth == 0:
                self.close(unit, force=True)
        self.close_all()

    # ------------------------------------------------------------------ homes

    def access(self, refs: list[PagedParam], use: Access, *, raw: bool, plain: bool) -> list[PagedParam]:
        """Make the homes of parameters valid and current for the caller, outside their windows.

        Returns those whose home is to be used instead of the parameter: wherever no gradient is wanted (``plain``), since then
        the parameter may move meanwhile.
        """
        # A signal handler amid the session's own work leaves windows as they are.
        amid = self.busy()
        with self.lock:
            return self._access(refs, use, amid, raw=raw, plain=plain)

    def _access(self, refs: list[PagedParam], use: Access, amid: bool, *, raw: bool, plain: bool) -> list[PagedParam]:
        self.alive()
        if not amid:
            self.used = None
        units = dict.fromkeys(ref.unit for ref in refs)
        for unit in units:
            check_places(self.engine, unit)
            if unit.moving and not amid:
                self._go_home(unit)
        if in_backward() and not raw and not amid:
            units = dict.fromkeys(u for u in units if u.depth > 0 or not self.open(u, BACKWARD))
        self.strays += len(units)
        # Before they are read: what a handler reads meanwhile does not take their memory.
        use.units.update(units)
        for unit in units:
            self.engine.settle(unit.engine_id, self.stream())
            if self.saving is not None:
                # The caller may be about to edit it, and only what is home has been read, or can be.
                _core.preserve(self.engine, unit.engine_id)
            if not amid:
                take_frame_edits(self, unit)
        self._fault_in(units)
        with unguarded():
            at_home = [ref for ref in refs if ref.unit in units and (plain or not ref.param.requires_grad)]
            for ref in at_home:
                ref.prepare_stand_in()
        use.themselves.update(units.keys() - {ref.unit for ref in at_home})
        if raw:
            for unit in units:
                look_at_home(unit)
        return at_home

    def access_grad(self, ref: PagedParam) -> None:
        """Make a gradient in its segment valid for the caller."""
        self.alive()
        self.engine.settle_update(ref.unit.engine_id, self.stream())
        self.engine.wait_gradients(self.stream())
        # Not every operation that changes a tensor says so: whoever looks may have changed it.
        self.speculation.drop(ref.unit)
        apply_pending(ref)
        ref.norm = None

    def edited(self, ref: PagedParam) -> None:
        """Note that a parameter was edited in its home."""
        ref.edited = True
        if ref.unit.on_nvme:
            self.engine.store_shadow(ref.unit.engine_id, self.stream())
        self.engine.invalidate(ref.unit.engine_id, self.stream())
        # Last: until then the edit counts as not yet seen.
        with unguarded():
            ref.version = ref.param._version
        renew_home(ref.unit, [ref])
        refresh_frames(self, ref.unit)

    def _fault_in(self, units: Iterable[Unit]) -> None:
        """Read what lives on NVMe; what was read for earlier accesses makes room."""
        for unit in units:
            if unit.behind:
                self._catch_up(unit)
        adopt(self, units)
        missing = [unit for unit in units if unit.on_nvme and not unit.shadow_filled]
        if not missing:
            return
        self._make_room(units)
        for unit in missing:
            fetch(self, unit, keep=units)

    def _make_room(self, units: Iterable[Unit]) -> None:
        """Give back the memory of earlier reads that nobody looks at any more, but not that of these units."""
        adopt(self, self.units)
        for unit in self.units:
            if unit.shadow_filled and unit.depth == 0 and unit not in units and unit is not self.used:
                self._before_use(unit)

    def _retire_shadow(self, unit: Unit) -> None:
        if unit.shadow_filled and not unit.is_read() and not unit.home_aliased():
            unit.shadow_filled, unit.home_seen = False, None
            self.engine.discard_shadow(unit.engine_id)

    def _catch_up(self, unit: Unit) -> None:
        """Show an update of the home to those who look at it."""
        self.engine.settle(unit.engine_id, self.stream())
        if unit.on_nvme and unit.shadow_filled:
            # Somebody looks at the old bytes: bring the new ones under the same addresses.
            self.engine.refresh_shadow(unit.engine_id, self.stream())
        if unit.on_nvme and not unit.shadow_filled:
            unit.home_seen = None
        renew_home(unit, unit.params)
        refresh_frames(self, unit)
        unit.behind = False

    def _before_use(self, unit: Unit) -> None:
        """Take note of edits that went past the guard, before the frames are filled."""
        check_places(self.engine, unit)
        if unit.behind:
            self._catch_up(unit)
        if unit.on_nvme:
            adopt(self, [unit])
        take_edits(self, unit)
        self._retire_shadow(unit)

    @_locked
    def take_all_edits(self) -> None:
        """Take note of edits that went past the guard, of all units, outside of windows."""
        self._bring_down()
        self.recover()
        for unit in self.units:
            adopt(self, [unit])
            if unit.behind or unit.home_seen is not None:
                self.engine.settle(unit.engine_id, self.stream())
            self._before_use(unit)

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
        stream = self.stream()
        if bring_down(self.landing, ref, stream, self.clipping.norms):
            self.speculation.arrived(ref, stream)
        self.landing.reap(stream)

    @_locked
    def move_out(self, ref: PagedParam) -> None:
        """Give a gradient memory of its own: its address is about to be taken."""
        move_out(ref)

    @_locked
    def backward_ended(self, task: int) -> None:
        """Run at the end of a backward: all gradients are in their segments for whoever looks."""
        self._bring_down()
        self.landing.finish(self.stream())
        self._task = -1
        self.ranges.backward(None)
        self.speculation.backward_ended(self.units)
        for unit in self.units:
            unit.end_backward(task)
            if unit.held and unit.depth == 0:
                self.close(unit)

    def clip(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], guarded: type[torch.Tensor]
    ) -> Any:
        """Answer an operation of ``clip_grad_norm_`` from what is known; ``NotImplemented`` if it has to be run."""
        return recognised(func, args, kwargs, guarded)

    def want_norms(self, kind: str) -> None:
        """Have the norms of gradients taken as they come, by this operation."""
        self.clipping.norms = kind

    def keep_factor(self, factor: torch.Tensor) -> bool:
        """Keep a factor of gradients until the next step; False if there are too many."""
        return self.clipping.keep(factor)

    # ------------------------------------------------------------------ steps

    @_locked
    def before_step(self, units: list[Unit]) -> list[Unit]:
        """Settle edits and aliases; returns the units whose homes somebody looks at, to be waited for."""
        self.alive()
        self._bring_down()
        if in_backward():
            self.close_all()
        else:
            self.recover()
        watched = []
        for unit in units:
            self.engine.settle_update(unit.engine_id, self.stream())
            self._before_use(unit)
            looked_at = unit.home_aliased() or unit.is_read()
            if unit.shadow_filled or looked_at or unit.frames_seen is not None or unit.is_open:
                watched.append(unit)
        return watched

    def stepped(self, refs: list[PagedParam], watched: list[Unit]) -> None:
        """Bump versions. Interrupted, it can be run again."""
        with unguarded():
            for ref in refs:
                torch.autograd.graph.increment_version(ref.param)
                ref.version = ref.param._version
                ref.edited, ref.stepped = False, True
        self.clipping.stepped()
        for unit in watched:
            unit.behind = True

    def after_step(self, watched: list[Unit]) -> None:
        """Let aliases of homes see the new values."""
        self.log.stepped()
        for unit in watched:
            if unit.behind:
                self._catch_up(unit)

    def before_accumulate(self, ref: PagedParam) -> None:
        """Autograd is about to add to a gradient that may still be on its way, or is yet to be multiplied."""
        if ref.param.grad is ref.grad:
            self.access_grad(ref)

    def drop_unused(self, *, keep: Iterable[Unit] = ()) -> None:
        """Give back the memory of all earlier reads, of weights and of optimizer states, that nobody looks at any more."""
        self._make_room(keep)
        for unit in self.units:
            for ref in unit.params:
                if ref.states is not None:
                    ref.states.drop_unused()

    # ------------------------------------------------------------------ life

    def alive(self) -> None:
        """Raise if the model cannot be used."""
        check_alive(self)
        note_step(self)
