"""One offloaded model: what its windows, homes and gradients have in common, and whether it can be used.

Each theme has its own object, which owns its state: :class:`Windows`, :class:`Homes`, :class:`Gradients`. They know nothing of the session; its
methods hold the lock around theirs, and are what hooks, guards and optimizers call.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from funicular import _core
from funicular._core import BACKWARD, EVAL
from funicular.errors import Error
from funicular.gradients.arrival import move_out
from funicular.gradients.backward import Gradients
from funicular.gradients.clipping import recognised
from funicular.homes.current import Homes
from funicular.homes.digests import look_at_home
from funicular.homes.edits import edit_of_shared, take_frame_edits
from funicular.homes.moved import check_places
from funicular.ranks.gradients import RankGradients
from funicular.report.growth import Growth
from funicular.report.log import StepLog
from funicular.report.nvtx import ranges
from funicular.torch_internals.autograd import adds_to, at_end_of_backward, backward_task, in_backward
from funicular.torch_internals.memory import stream_of
from funicular.torch_internals.modes import no_modes
from funicular.torch_internals.overrides import unguarded
from funicular.units.param import PagedParam, ref_of
from funicular.units.unit import Access, Unit, Where
from funicular.windows.leases import LeaseHooks
from funicular.windows.shutdown import check_alive, leave, living
from funicular.windows.signals import note_step, refuse_backward
from funicular.windows.window import Windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from funicular._core import Engine, Save
    from funicular.policy import Policy
    from funicular.ranks.group import Group

__all__ = ["Session"]

_R = TypeVar("_R")


def _locked(method: Callable[..., _R]) -> Callable[..., _R]:
    @functools.wraps(method)
    def wrapper(self: Session, *args: Any, **kwargs: Any) -> _R:
        if in_backward():
            refuse_backward(self)
        with self.lock:
            return method(self, *args, **kwargs)

    return wrapper


class Session:
    """State of one offloaded model on the Python side."""

    def __init__(self, engine: Engine, device: torch.device, policy: Policy, group: Group | None = None) -> None:
        self.engine = engine
        #: the ranks that train the model together; None for a process that trains alone
        self.group = group
        self.policy = policy
        self.log = StepLog(engine, policy.to_dict(), None if group is None else (group.rank, group.size))
        self.ranges = ranges(policy.log.nvtx, device)
        self.growth = Growth(engine, device)
        self.device = device
        self.units: list[Unit] = []
        #: parameters that are not paged: they live on the compute device
        self.residents: list[torch.nn.Parameter] = []
        self.poison = policy.debug.poison
        self.homes = Homes(engine, device, self.units)
        self.gradients: Gradients
        if group is None:
            self.gradients = Gradients(engine, device, sums_up=_core.brings_sums_up(engine))
        else:
            self.gradients = RankGradients(engine, device, group)
            self.homes.refuse = self._refuse_edit
        self.windows = Windows(
            self.homes, self.units, self.gradients.backwards, poison=self.poison, shared=group is not None
        )
        self.homes.room_elsewhere = self.gradients.make_room
        self.leases = LeaseHooks()
        self.activations: Any = None  # see Activations: block inputs that wait in host memory, where the policy says so
        self.held: Any = None  # see Held: the model that was given to offload, and what it holds
        self.handles: list[Any] = []  # everything hung on the model: each has ``remove()``
        self.pid = os.getpid()
        #: several threads may run the model at once; windows are opened and closed by one at a time
        self.lock = threading.RLock()
        self.busy: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        #: takes note of a step that the runtime may have taken, until that is noted; it can be run again
        self.unnoted: Callable[[], None] | None = None
        self.started = time.monotonic()
        #: a step waits for its updates where they compete with the forward for the same cores and nothing comes from NVMe
        self.waits = False
        self.strays = 0
        self.closed = False
        #: the save under way, or the last one
        self.saving: Save | None = None
        #: why the model must not be used: a load that failed halfway
        self.partial = ""
        self.loading = False
        #: the caller knows of optimizer states that cannot be read
        self.told_lost = False
        #: the last step in which there was a forward with gradients
        self.trained = 0
        living.add(self)

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        """Make parameters that are still held ordinary tensors, and give the rest back; also when Python has unloaded modules."""
        if "closed" not in self.__dict__:
            return  # interrupted while it was made
        self.held = None  # who else holds a parameter is counted below
        if not self.closed and getpid() == self.pid:
            with contextlib.suppress(Error):
                _core.saved(self.engine)
            if self.log.step > 1:  # not where offload failed
                self.log.ended()
            # The garbage collector may come amid torch.export, whose modes would see what is done here.
            with no_modes():
                for unit in self.units:
                    with contextlib.suppress(Error):
                        leave(self, unit)
        for unit in self.units:
            unit.params.clear()
            unit.neighbours.clear()
        if getpid() == self.pid:
            self.gradients.closing()
            if self.group is not None:
                self.group.close()
            self.engine.close()

    # A copied or pickled model is an ordinary one.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def stream(self) -> int:
        """Raw handle of the caller's compute stream."""
        return stream_of(self.device)

    @property
    def unwrapped(self) -> bool:
        """Whether the parameters are ordinary ones again."""
        return self.closed and self.held is None

    # ------------------------------------------------------------------ windows

    @_locked
    def open(self, unit: Unit, phase: int) -> bool:
        """Bring a unit's parameters to their frames; False if they must be used from their home."""
        if phase == BACKWARD:
            self.ranges.backward(unit.name)
        if phase != EVAL:
            self.log.at(unit.name)
        if unit.where is not Where.FRAME or os.getpid() != self.pid:  # a child may be forked amid a window
            self.alive()
        opened = self.windows.open(unit, phase)
        if in_backward():
            if opened:
                self._watch_backward()
            if self.gradients.opened(unit):
                self._watch_backward()
                self.gradients.backwards.bring(backward_task())
        return opened

    def open_for_backward(self, unit: Unit) -> bool:
        """Open a unit whose saved tensors are needed now; False: use the home's bytes."""
        return self.open(unit, BACKWARD)

    @_locked
    def close(self, unit: Unit) -> None:
        """Bring the parameters home and give the frames up, unless other tensors look at them."""
        self.windows.close(unit)

    @_locked
    def close_left(self, unit: Unit) -> None:
        """Close a window whose end found another thread's operation on the parameters under way."""
        if unit.is_open and not unit.is_inside() and unit.depth == 0:
            self.windows.close(unit)

    @_locked
    def close_all(self) -> None:
        """Close what is not in use: before a step, and where nothing of a forward is left."""
        self.windows.close_all()

    @_locked
    def recover(self) -> None:
        """Close what this thread left open: nothing of a forward or backward is under way in it."""
        self.windows.recover()

    def end_windows(self) -> None:
        """Take note that the parameters are ordinary ones: what other threads leave from now on is no window any more."""
        for unit in self.units:
            unit.end_leaving()
            unit.release_frames()
        self.activations = None
        self.closed, self.held = True, None

    def _watch_backward(self) -> None:
        task = backward_task()
        if task not in self.gradients.backwards:
            ending = functools.partial(self.backward_ended, task)
            self.gradients.watched(task, ending)
            at_end_of_backward(ending)

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
            self.homes.end_use()
        units = dict.fromkeys(ref.unit for ref in refs)
        for unit in units:
            check_places(self.engine, unit)
            if unit.moving and not amid:
                self.windows.go_home(unit)
        if in_backward() and not raw and not amid:
            units = dict.fromkeys(u for u in units if u.depth > 0 or not self.open(u, BACKWARD))
        self.strays += len(units)
        # Before they are read: a signal handler that reads meanwhile must not drop their memory.
        use.units.update(units)
        for unit in units:
            self.engine.settle(unit.engine_id, self.stream())
            if self.saving is not None:
                # The caller may be about to edit it, and only what is home has been read, or can be.
                _core.preserve(self.engine, unit.engine_id)
            if not amid:
                take_frame_edits(self.homes, unit)
        self.homes.fault_in(units)
        with unguarded():
            at_home = [ref for ref in refs if ref.unit in units and (plain or not ref.param.requires_grad)]
            for ref in at_home:
                ref.prepare_stand_in()
        use.themselves.update(units.keys() - {ref.unit for ref in at_home})
        if raw:
            for unit in units:
                look_at_home(unit)
        return at_home

    def edited(self, ref: PagedParam) -> None:
        """Note that a parameter was edited in its home."""
        self.homes.edited(ref)

    def use_home(self, unit: Unit) -> None:
        """Make a unit's home current, for use where its frames are not to be had."""
        self.homes.use_home(unit)

    @_locked
    def drop_unused(self, *, keep: Iterable[Unit] = ()) -> None:
        """Give back the memory of all earlier reads, of weights and of optimizer states, that nothing looks at any more."""
        self.homes.drop_unused(keep=keep)

    @_locked
    def take_all_edits(self) -> None:
        """Take note of edits that went past the guard, of all units, outside of windows."""
        self.gradients.bring_down()
        self.windows.recover()
        for unit in self.units:
            self.homes.adopt([unit])
            if unit.behind or unit.home_seen is not None:
                self.engine.settle(unit.engine_id, self.stream())
            self.homes.before_use(unit)

    # ------------------------------------------------------------------ gradients

    def before_accumulate(self, ref: PagedParam) -> None:
        """Take note that a gradient has come of a parameter, which autograd may be about to add to one that is there.

        The latter may still be on its way, or be yet to be multiplied.
        """
        if not adds_to(ref.param):
            return  # ``torch.autograd.grad``, of any thread: it leaves the parameter's gradient alone
        with self.lock:
            if in_backward():
                self._watch_backward()
                if not self.gradients.about_to_add(ref):
                    return
            if ref.unit.grads_on_nvme and ref.param.grad is ref.grad:
                self.alive()
                if self.gradients.lift(ref):
                    return
            self.gradients.before_accumulate(ref)

    @_locked
    def gradient_arrived(self, param: torch.Tensor) -> None:
        """Take note that autograd accumulated into ``param.grad``."""
        self._watch_backward()
        self.gradients.backwards.bring(backward_task())
        self.gradients.arrived(ref_of(param))

    def access_grad(self, ref: PagedParam) -> None:
        """Make a gradient in its segment valid for the caller."""
        self.access_grads([ref])

    def access_grads(self, refs: list[PagedParam]) -> None:
        """Make gradients in their segments valid for the caller, all at the same time."""
        self.alive()
        with self.lock:
            for ref in refs:
                self.gradients.settle(ref, refs)

    @_locked
    def move_out(self, ref: PagedParam) -> None:
        """Give a gradient memory of its own: its address is about to be taken."""
        move_out(ref)

    @_locked
    def backward_ended(self, task: int) -> None:
        """Run at the end of a backward: all gradients are in their segments, where the caller can read them."""
        if self.closed:
            return  # the model was used and unwrapped within a backward of another one
        if self.group is not None or self.gradients.backwards.brings(task):
            # Not at the end of any other: those of a backward that another thread is in are still coming.
            self.gradients.backward_ended(task)
        self.gradients.backwards.end(task)
        self.ranges.backward(None)
        for unit in self.units:
            unit.end_backward(task)
            if unit.held and unit.depth == 0:
                self.windows.close(unit)

    def clip(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], guarded: type[torch.Tensor]
    ) -> Any:
        """Answer an operation of ``clip_grad_norm_`` from what is known; ``NotImplemented`` if it has to be run."""
        with self.lock:
            return recognised(func, args, kwargs, guarded)

    def clear_grad(self, ref: PagedParam, grad: torch.Tensor) -> bool:
        """Carry out ``zero_`` of a shared gradient, for this process; False if it has to be run."""
        self.alive()
        with self.lock:
            return self.gradients.clear(ref, grad)

    def want_norms(self, kind: str) -> None:
        """Have the norms of gradients taken as they come, by this operation."""
        self.gradients.clipping.norms = kind

    def keep_factor(self, factor: torch.Tensor) -> bool:
        """Keep a factor of gradients until the next step; False if there are too many."""
        return self.gradients.clipping.keep(factor)

    # ------------------------------------------------------------------ several ranks

    @property
    def shared(self) -> bool:
        """Whether homes and gradients are the same memory for several processes, of which each would make an edit."""
        return self.group is not None and not self.loading

    @property
    def leads(self) -> bool:
        """Whether this process writes what all ranks would write alike."""
        return self.group is None or self.group.rank == 0

    def _refuse_edit(self, ref: PagedParam) -> None:
        if self.shared:
            self.partial = f"'{ref.name}' was edited in memory that all ranks share."
            _core.fail_rank(self.engine, self.partial)
            raise edit_of_shared(f"'{ref.name}'")

    @_locked
    def join(self) -> None:
        """Wait until all ranks are at their step."""
        self.alive()
        self.gradients.join()

    # ------------------------------------------------------------------ steps

    def bring_down(self) -> None:
        """Have gradients that have come sent to their places, before a step looks which there are."""
        if self.gradients.pending and not self.closed and not self.busy():  # a handler's step is refused
            with self.lock:
                self.gradients.bring_down()

    @_locked
    def before_step(self, units: list[Unit]) -> list[Unit]:
        """Settle edits and aliases; returns the units whose homes other tensors look at, to be waited for."""
        self.alive()
        self.gradients.bring_down()
        if in_backward():
            self.windows.close_all()
        else:
            self.windows.recover()
        watched = []
        for unit in units:
            self.engine.settle_update(unit.engine_id, self.stream())
            self.homes.before_use(unit)
            looked_at = unit.home_aliased() or unit.is_read()
            if unit.shadow_filled or looked_at or unit.frames_seen is not None or unit.is_open:
                watched.append(unit)
        return watched

    def stepped(self, refs: list[PagedParam], watched: list[Unit]) -> None:
        """Bump versions. Interrupted, it can be run again."""
        with unguarded():
            for ref in refs:
                ref.note_step()
        self.gradients.clipping.stepped()
        for unit in watched:
            unit.fall_behind()

    def after_step(self, watched: list[Unit]) -> None:
        """Let aliases of homes see the new values."""
        self.log.stepped()
        self.growth.stepped()
        for unit in watched:
            if unit.behind:
                self.homes.catch_up(unit)

    # ------------------------------------------------------------------ life

    def alive(self) -> None:
        """Raise if the model cannot be used."""
        check_alive(self)
        note_step(self)
