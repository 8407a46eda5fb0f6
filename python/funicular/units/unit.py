"""What the wrapper knows of a model: units and their parameters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

from funicular.errors import RuntimeFailure
from funicular.torch_internals.autograd import backward_task, in_backward
from funicular.torch_internals.memory import number_of, same_storage, uses_of
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    import torch

    from funicular.units.owner import Owner, States

__all__ = [
    "UNDER_WAY",
    "Access",
    "Link",
    "ModuleCall",
    "PagedParam",
    "Unit",
    "link",
    "ref_of",
]


class Access:
    """One operation on parameters outside of windows."""

    __slots__ = ("themselves", "thread", "units")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        #: whose homes are looked at
        self.units: set[Unit] = set()
        #: whose parameters are the operands, so that they must not move meanwhile
        self.themselves: set[Unit] = set()


#: Operations under way, of all threads. Appending and removing is one call each, so that an interruption leaves nothing behind.
UNDER_WAY: list[Access] = []


def _nothing() -> None:
    return None


class Link:
    """Weak, since the garbage collector does not see all that tensors hold: a model must die with its last user."""

    __slots__ = ("_ref",)

    def __init__(self, to: Any) -> None:
        self._ref = weakref.ref(to)

    def __call__(self) -> Any:
        """Return what it leads to; None once that is gone."""
        return self._ref()

    # A copied or pickled parameter is an ordinary one: it takes nothing of the runtime along.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def link(tensor: torch.Tensor, ref: PagedParam) -> None:
    """Let a parameter or gradient lead to its place."""
    tensor._funicular_ref = Link(ref)  # type: ignore[attr-defined]


def ref_of(tensor: torch.Tensor) -> PagedParam | None:
    """Return the place of an offloaded parameter or of its gradient; None for ordinary tensors."""
    found = tensor.__dict__.get("_funicular_ref")
    ref: PagedParam | None = None if found is None else found()
    return ref


class PagedParam:
    """One parameter: where its bytes are, and what was last seen of it."""

    __slots__ = (
        "__weakref__",
        "edited",
        "factor",
        "frame",
        "frame_address",
        "frame_storage",
        "grad",
        "grad_storage",
        "guarded",
        "home",
        "home_address",
        "home_storage",
        "kind",
        "name",
        "norm",
        "numel",
        "offset",
        "param",
        "section",
        "seen",
        "stand_in",
        "start",
        "states",
        "stepped",
        "touched",
        "trainable",
        "unit",
        "version",
        "version_before",
        "views",
        "window",
    )

    def __init__(self, param: torch.nn.Parameter, name: str, unit: Unit, place: tuple[int, int, int, int]) -> None:
        # Strong, so that the counts of who shares a storage stay comparable.
        self.param = param
        self.name = name
        #: its class when it is not offloaded, outside its window, and inside
        self.kind: type[torch.nn.Parameter] = type(param)
        self.guarded: type[torch.nn.Parameter]
        self.window: type[torch.nn.Parameter]
        self.unit = unit
        self.section, self.start, self.numel, self.offset = place
        # Each of the three places has a storage of its own, of exactly the parameter's bytes: other libraries tell shared tensors by
        # their storages, and pickle whole storages.
        self.frame_storage: torch.UntypedStorage
        self.home_storage: torch.UntypedStorage
        self.grad_storage: torch.UntypedStorage | None = None
        #: The tensors over frame and home share the parameter's version counter, and stay there while the parameter is elsewhere.
        self.frame: torch.Tensor
        self.frame_address = 0
        self.home: torch.Tensor
        self.home_address = 0
        #: a parameter over the home, for operations that must not see the parameter move; until it has moved in, itself
        self.stand_in = param
        self.grad: torch.Tensor | None = None
        #: views of the gradient's place that were handed out
        self.views: list[weakref.ref[torch.Tensor]] = []
        #: norm of the gradient when it came, the version of its place then, and the operation that gave it
        self.norm: tuple[torch.Tensor, int, str] | None = None
        #: what the gradient is yet to be multiplied by
        self.factor: torch.Tensor | None = None
        self.trainable = False
        self.version = -1
        #: the parameter's version when it was offloaded
        self.version_before = -1
        self.edited = False
        #: digest of the frame when its window opened, or when it was first reached past the version counter
        self.seen: int | None = None
        self.touched = False
        #: the optimizer's states, while they are in the runtime
        self.states: States | None = None
        #: the runtime's states are not blank any more
        self.stepped = False

    def prepare_stand_in(self) -> None:
        """Let the stand-in need a gradient if the parameter does: torch chooses between kernels by it, even under ``no_grad``."""
        if self.stand_in.requires_grad != self.param.requires_grad:
            self.stand_in.requires_grad_(self.param.requires_grad)

    def at_frame(self) -> bool:
        """Whether the parameter is at its frame; the caller has switched guards off."""
        return same_storage(self.param, self.frame_storage)

    def at_home(self) -> bool:
        """Whether the parameter is at its home; the caller has switched guards off."""
        return same_storage(self.param, self.home_storage)


class ModuleCall:
    """A call of a module under way. Units list theirs: one call into C each, which an interruption cannot cut in two."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Unit:
    """The parameters that are paged together, and the state of their window."""

    __slots__ = (
        "_owner",
        "addresses",
        "arrived",
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
        "guess",
        "held",
        "home_idle",
        "home_seen",
        "home_storages",
        "inside",
        "is_open",
        "moving",
        "name",
        "nbytes",
        "neighbours",
        "on_nvme",
        "params",
        "shadow_filled",
        "spare",
        "storages",
        "trained",
    )

    def __init__(self, owner: Owner, engine_id: int, name: str) -> None:
        # Weak, so that a model's memory is given back with its last user and not at some later garbage collection.
        self._owner = weakref.ref(owner)
        self.engine_id = engine_id
        self.name = name
        self.params: list[PagedParam] = []
        self.nbytes = 0
        self.neighbours: list[Unit] = []
        self.on_nvme = False
        #: its update may begin before the step
        self.spare = False
        #: how many parameters are trained, those with a gradient from this backward, and what an update that was begun started from
        self.trained = 0
        self.arrived: set[PagedParam] = set()
        self.guess: list[tuple[bool, int, int]] | None = None
        self.shadow_filled = False
        #: calls of the unit's modules under way
        self.calls: list[ModuleCall] = []
        #: threads for which the parameters are plain, with -1 - the backward in which they came in
        self.inside: dict[int, int] = {}
        #: the parameters are at their frames
        self.is_open = False
        #: they were on their way there or back when something struck: some may be here and some there
        self.moving = False
        #: the frames have edits that the home lacks
        self.dirty = False
        #: the engine keeps the frames for this unit, or did until just now
        self.held = False
        #: the home was updated since those who look at it were last taken into account
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
        # Numbers of the parameters' storages, and how many uses each of them has while nobody else uses it.
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

    def count_idle(self) -> None:
        """Note how many uses the storages have now, while the runtime's own tensors and the parameters at home are all there are."""
        self.note_storages()
        self.frame_idle = min(map(uses_of, self.frame_storages), default=0)
        self.home_idle = min(map(uses_of, self.home_storages), default=0)
        self.grad_idle = min(map(uses_of, self.grad_storages), default=0)

    def note_storages(self) -> None:
        """Note which storages the parameters have."""
        refs = self.params
        self.frame_storages = [number_of(ref.frame_storage) for ref in refs]
        self.home_storages = [number_of(ref.home_storage) for ref in refs]
        self.grad_storages = [number_of(ref.grad_storage) for ref in refs if ref.grad_storage is not None]
        # Those of parameters without elements begin nowhere.
        self.storages = [s for ref in refs if ref.numel > 0 for s in (ref.frame_storage, ref.home_storage)]
        self.addresses = [a for ref in refs if ref.numel > 0 for a in (ref.frame_address, ref.home_address)]

    def frame_in_use(self) -> bool:
        """Whether anything but the runtime's own tensors looks at the frames."""
        uses = list(map(uses_of, self.frame_storages))
        if self.moving:
            return any(count > self.frame_idle + away for count, away in zip(uses, self._away(), strict=True))
        return max(uses, default=0) > self.frame_idle + self.is_open

    def home_aliased(self) -> bool:
        """Whether anything but the parameters themselves looks at the home, or may."""
        if self.exposed:
            return True
        uses = list(map(uses_of, self.home_storages))
        if self.moving:
            return any(count > self.home_idle - away for count, away in zip(uses, self._away(), strict=True))
        return max(uses, default=0) > self.home_idle - self.is_open

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

    def has_others_inside(self) -> bool:
        """Whether other threads may be using the parameters at their frames."""
        return len(self.inside) > (threading.get_ident() in self.inside)

    def let_in(self) -> None:
        """Let this thread use the parameters at their frames."""
        self.inside.setdefault(threading.get_ident(), -1 - backward_task())

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

    def end_backward(self, task: int) -> None:
        """Let nobody in for the sake of a backward that is over."""
        for thread in [thread for thread, what in self.inside.items() if what == -1 - task]:
            if not self._called_by(thread):
                del self.inside[thread]

    def _called_by(self, thread: int) -> bool:
        return any(call.thread == thread for call in self.calls)

    def _away(self) -> list[bool]:
        """Which parameters are at their frames, while they are on their way."""
        with unguarded():
            return [ref.at_frame() for ref in self.params]
