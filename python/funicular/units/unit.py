"""Units: parameters that are paged together, and where they are.

What changes of a unit is written by its own methods alone (tests/tidy.rs).
"""

from __future__ import annotations

import enum
import threading
import weakref
from typing import TYPE_CHECKING

from funicular.errors import RuntimeFailure
from funicular.torch_internals.autograd import backward_task, in_backward
from funicular.torch_internals.memory import number_of, uses_of
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from funicular._core import Engine
    from funicular.units.owner import Owner
    from funicular.units.param import PagedParam

__all__ = [
    "GRADIENTS_UNDER_WAY",
    "UNDER_WAY",
    "Access",
    "ModuleCall",
    "Unit",
    "Where",
]


class Access:
    """One operation on parameters outside of windows."""

    __slots__ = ("gradients", "themselves", "thread", "units")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        #: whose homes are looked at
        self.units: set[Unit] = set()
        #: whose parameters are the operands, so that they must not move meanwhile
        self.themselves: set[Unit] = set()
        #: whose gradients' places are looked at
        self.gradients: list[PagedParam] = []

    def look_at(self, gradients: list[PagedParam]) -> None:
        """Take note that the operation looks at the places of gradients."""
        self.units.update(ref.unit for ref in gradients)
        self.gradients.extend(gradients)


#: Operations under way, of all threads. Appending and removing is one call each, so that an interruption leaves nothing behind.
UNDER_WAY: list[Access] = []
#: The same for operations on gradients in their places: what is there stays meanwhile, and the memory of those that live on NVMe.
GRADIENTS_UNDER_WAY: list[Access] = []


class ModuleCall:
    """A call of a module under way. Units list theirs: one call into C each, which an interruption cannot cut in two."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Where(enum.Enum):
    """Where a unit's parameters are. ``Unit`` has the steps between them."""

    HOME = "home"
    #: on their way to the frames when something struck, or now: some may be there and some at home
    ENTERING = "entering"
    FRAME = "frame"
    #: on their way home, as above
    LEAVING = "leaving"


class Unit:
    """The parameters that are paged together, and the state of their window.

    ``HOME`` - :meth:`begin_entering` -> ``ENTERING`` - :meth:`end_entering` -> ``FRAME`` - :meth:`begin_leaving` -> ``LEAVING`` -
    :meth:`end_leaving` -> ``HOME``. From ``ENTERING`` it goes back by :meth:`turn_back`, before anything has moved, or by leaving.
    """

    __slots__ = (
        "_owner",
        "addresses",
        "begun_from",
        "behind",
        "calls",
        "dirty",
        "engine_id",
        "exposed",
        "frame_idle",
        "frame_storages",
        "frames_seen",
        "grad_idle",
        "grad_storages",
        "grads_on_nvme",
        "held",
        "home_idle",
        "home_seen",
        "home_storages",
        "inside",
        "name",
        "nbytes",
        "neighbours",
        "on_nvme",
        "params",
        "shadow_filled",
        "spare_copy",
        "storages",
        "trained",
        "where",
    )

    def __init__(
        self, owner: Owner, engine_id: int, name: str, *, on_nvme: bool, grads_on_nvme: bool, spare_copy: bool
    ) -> None:
        # Weak, so that a model's memory is given back with its last user and not at some later garbage collection.
        self._owner = weakref.ref(owner)
        self.engine_id = engine_id
        self.name = name
        self.params: list[PagedParam] = []
        self.nbytes = 0
        self.neighbours: list[Unit] = []
        self.on_nvme = on_nvme
        self.grads_on_nvme = grads_on_nvme
        #: it has a spare copy of its states: its update may begin before the step
        self.spare_copy = spare_copy
        #: how many parameters are trained, and what a speculative update began from
        self.trained = 0
        self.begun_from: list[tuple[bool, int, int]] | None = None
        self.shadow_filled = False
        #: calls of the unit's modules under way
        self.calls: list[ModuleCall] = []
        #: threads for which the parameters are plain: 0 for a module's call, -1 - the number of a backward until that is over
        self.inside: dict[int, int] = {}
        self.where = Where.HOME
        #: the frames have edits that the home lacks
        self.dirty = False
        #: set before the engine gives the unit frames, cleared after it has taken them back
        self.held = False
        #: the home was updated since the tensors that look at it were last given its values
        self.behind = False
        #: a raw address in the home was handed out, and may be in use for ever
        self.exposed = False
        #: digests of the parameters' homes, while others look at the home
        self.home_seen: list[int] | None = None
        #: digests of the parameters' frames, while others look at them and no window is open
        self.frames_seen: list[int] | None = None
        #: storages of all homes and frames, and where they are to begin
        self.storages: list[torch.UntypedStorage] = []
        self.addresses: list[int] = []
        # Numbers of the parameters' storages, and how many uses each of them has while only the runtime uses it.
        self.frame_storages: list[int] = []
        self.home_storages: list[int] = []
        self.grad_storages: list[int] = []
        self.frame_idle = 0
        self.home_idle = 0
        self.grad_idle = 0

    @property
    def owner(self) -> Owner:
        """The session that the unit belongs to."""
        owner = self._owner()
        if owner is None:
            raise RuntimeFailure("FN-E104", "the offloaded model is gone. Keep the model, or unwrap it first.")
        return owner

    # ------------------------------------------------------------------ where its parameters are

    @property
    def is_open(self) -> bool:
        """Whether the parameters are at their frames, or were until now."""
        return self.where is Where.FRAME or self.where is Where.LEAVING

    @property
    def moving(self) -> bool:
        """Whether the parameters are on their way."""
        return self.where is Where.ENTERING or self.where is Where.LEAVING

    def begin_entering(self) -> None:
        """Begin the way to the frames, which the engine is about to be asked for."""
        self.held = True
        self.where = Where.ENTERING

    def turn_back(self) -> None:
        """Stay at home: the engine has no frames, and nothing has moved."""
        self.held = False
        self.where = Where.HOME

    def end_entering(self) -> None:
        """End the way to the frames."""
        self.where = Where.FRAME

    def begin_leaving(self) -> bool:
        """Begin the way home; returns whether a way had begun before and was not ended."""
        before, self.where = self.where, Where.LEAVING
        return before is not Where.FRAME

    def end_leaving(self) -> None:
        """End the way home: no thread is inside."""
        self.inside.clear()
        self.where = Where.HOME

    def release_frames(self) -> None:
        """Take note that the engine has the frames back."""
        self.held = False
        self.frames_seen = None

    # ------------------------------------------------------------------ what was seen of it

    def mark_dirty(self, dirty: bool) -> None:
        """Take note that the frames have edits that the home lacks, or that they have not any more."""
        self.dirty = dirty

    def fall_behind(self) -> None:
        """Take note that the home was updated, and those who look at it have not been taken into account."""
        self.behind = True

    def catch_up(self) -> None:
        """Take note that those who look at the home see the update."""
        self.behind = False

    def expose(self) -> None:
        """Take note that a raw address in the home is handed out."""
        self.exposed = True

    def see_home(self, digests: list[int] | None) -> None:
        """Remember digests of the parameters' homes; None: forget them."""
        self.home_seen = digests

    def see_frames(self, digests: list[int] | None) -> None:
        """Remember digests of the parameters' frames; None: forget them."""
        self.frames_seen = digests

    def fill_shadow(self, digests: list[int] | None) -> None:
        """Take note that weights on NVMe are in memory, with these digests if they are to be remembered."""
        self.shadow_filled, self.home_seen = True, digests

    def discard_shadow(self, engine: Engine) -> None:
        """Give back the memory of weights on NVMe, and take note of it: no signal handler runs between the two."""
        self.shadow_filled, self.home_seen = False, None
        engine.discard_shadow(self.engine_id)

    def has_all_gradients(self) -> bool:
        """Whether as many gradients have come of each trained parameter as came before the last step."""
        return all(ref.came >= max(ref.expected, 1) for ref in self.params if ref.trainable)

    def begin_from(self, inputs: list[tuple[bool, int, int]] | None) -> None:
        """Remember what a speculative update began from; None: there is none."""
        self.begun_from = inputs

    def add(self, ref: PagedParam) -> None:
        """Add a parameter, whose places are there."""
        self.params.append(ref)
        self.nbytes += ref.home.nbytes
        self.trained += ref.trainable

    # ------------------------------------------------------------------ who looks at its memory

    def count_idle(self) -> None:
        """Note how many uses the storages have now, while the runtime's own tensors and the parameters at home are all there are."""
        self.note_storages()
        self.frame_idle = min(map(uses_of, self.frame_storages), default=0)
        self.home_idle = min(map(uses_of, self.home_storages), default=0)
        self.grad_idle = min(map(uses_of, self.grad_storages), default=0)

    def note_storages(self) -> None:
        """Note which storages the parameters have."""
        refs = self.params
        frames = [number_of(ref.frame_storage) for ref in refs]
        homes = [number_of(ref.home_storage) for ref in refs]
        grads = [number_of(ref.grad_storage) for ref in refs if ref.grad_storage is not None]
        # Those of parameters without elements begin nowhere.
        storages = [s for ref in refs if ref.numel > 0 for s in (ref.frame_storage, ref.home_storage)]
        addresses = [a for ref in refs if ref.numel > 0 for a in (ref.frame_address, ref.home_address)]
        # Nothing is called in between: an interruption finds all of it or nothing.
        self.frame_storages, self.home_storages, self.grad_storages = frames, homes, grads
        self.storages, self.addresses = storages, addresses

    def frame_in_use(self) -> bool:
        """Whether anything but the runtime's own tensors looks at the frames."""
        uses, where = list(map(uses_of, self.frame_storages)), self.where
        if where is Where.ENTERING or where is Where.LEAVING:
            return any(count > self.frame_idle + away for count, away in zip(uses, self._away(), strict=True))
        return max(uses, default=0) > self.frame_idle + (where is Where.FRAME)

    def home_aliased(self) -> bool:
        """Whether anything but the parameters themselves looks at the home, or may."""
        if self.exposed:
            return True
        uses, where = list(map(uses_of, self.home_storages)), self.where
        if where is Where.ENTERING or where is Where.LEAVING:
            return any(count > self.home_idle - away for count, away in zip(uses, self._away(), strict=True))
        return max(uses, default=0) > self.home_idle - (where is Where.FRAME)

    def grads_aliased(self) -> bool:
        """Whether anything but the runtime's own tensors looks at the gradients' places."""
        return max(map(uses_of, self.grad_storages), default=0) > self.grad_idle

    def is_read(self) -> bool:
        """Whether an operation on the home is under way, in any thread."""
        return bool(UNDER_WAY) and any(self in use.units for use in list(UNDER_WAY))

    def is_used_by_others(self) -> bool:
        """Whether another thread's operation on the parameters themselves is under way, outside its windows."""
        if not UNDER_WAY:
            return False
        me = threading.get_ident()
        return any(use.thread != me and self in use.themselves for use in list(UNDER_WAY))

    def is_inside(self) -> bool:
        """Whether the parameters are plain for this thread. What a backward let in that has failed is outside."""
        by = self.inside.get(threading.get_ident())
        return by is not None and (by == 0 or by == -1 - backward_task())

    def others_inside(self, under_way: Callable[[int], bool]) -> bool:
        """Whether other threads may be using the parameters at their frames: in a module's call, or in a backward that is ``under_way``."""
        me = threading.get_ident()
        return any(
            thread != me and (self._called_by(thread) or (by < 0 and under_way(-1 - by)))
            for thread, by in list(self.inside.items())
        )

    def let_in(self) -> None:
        """Let this thread use the parameters at their frames."""
        if not self.is_inside():
            self.inside[threading.get_ident()] = -1 - backward_task()

    @property
    def depth(self) -> int:
        """How many calls of the unit's modules are under way."""
        return len(self.calls)

    def leave(self, call: ModuleCall) -> None:
        """Take note that a call is over; nothing to do if it never began, or is over already."""
        if call in self.calls:
            self.calls.remove(call)
        if not self._called_by(call.thread) and self.inside.pop(call.thread, None) is not None and in_backward():
            self.let_in()

    def forget_calls_of(self, thread: int) -> None:
        """Forget the calls of a thread in which nothing of a forward or backward is under way."""
        self.calls[:] = [call for call in self.calls if call.thread != thread]
        self.inside.pop(thread, None)

    def end_backward(self, task: int) -> None:
        """Take away the threads' access that a backward gave them, once it is over."""
        for thread in [thread for thread, what in self.inside.items() if what == -1 - task]:
            if not self._called_by(thread):
                del self.inside[thread]

    def _called_by(self, thread: int) -> bool:
        return any(call.thread == thread for call in self.calls)

    def _away(self) -> list[bool]:
        """Which parameters are at their frames, while they are on their way."""
        with unguarded():
            return [ref.at_frame() for ref in self.params]
