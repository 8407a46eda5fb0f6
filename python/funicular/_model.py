"""What the wrapper knows of a model: units and their parameters."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch

from funicular._errors import RuntimeFailure

if TYPE_CHECKING:
    from funicular._session import Session
    from funicular._states import ParamStates

__all__ = [
    "UNDER_WAY",
    "Link",
    "ParamRef",
    "Unit",
    "Use",
    "Visit",
    "in_backward",
    "link",
    "outdate",
    "ref_of",
    "storage_address",
    "storage_uses",
    "stream_of",
]


def in_backward() -> bool:
    """Whether the calling thread runs inside autograd's backward."""
    return torch._C._current_graph_task_id() != -1


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and handles share a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def storage_address(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins. Not by a method of the tensor: parameters in windows take note of such questions."""
    with torch._C.DisableTorchFunctionSubclass():
        return int(torch.Tensor.untyped_storage(tensor).data_ptr())


def stream_of(device: torch.device) -> int:
    """Raw handle of the stream that the calling thread computes on; 0 on the host."""
    if device.type != "cuda":
        return 0
    # Not `torch.cuda.current_stream`: dynamo puts its own stream objects there.
    return int(torch._C._cuda_getCurrentRawStream(device.index))


class Use:
    """One operation on parameters outside of windows."""

    __slots__ = ("themselves", "thread", "units")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        #: whose homes are looked at
        self.units: set[Unit] = set()
        #: whose parameters are the operands, so that they must not move meanwhile
        self.themselves: set[Unit] = set()


#: Operations under way, of all threads. Appending and removing is one call each, so that an interruption leaves nothing behind.
UNDER_WAY: list[Use] = []


def _nothing() -> None:
    return None


class Link:
    """Weak, since the garbage collector does not see all that tensors hold: a model must die with its last user."""

    __slots__ = ("_ref",)

    def __init__(self, to: Any) -> None:
        self._ref = weakref.ref(to)

    def __call__(self) -> Any:
        return self._ref()

    # A copied or pickled parameter is an ordinary one: it takes nothing of the runtime along.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_nothing, ())


def link(tensor: torch.Tensor, ref: ParamRef) -> None:
    """Let a parameter or gradient lead to its place."""
    tensor._funicular_ref = Link(ref)  # type: ignore[attr-defined]


def ref_of(tensor: torch.Tensor) -> ParamRef | None:
    """Return the place of an offloaded parameter or of its gradient; None for ordinary tensors."""
    found = tensor.__dict__.get("_funicular_ref")
    ref: ParamRef | None = None if found is None else found()
    return ref


class ParamRef:
    """One parameter: where its bytes are, and what was last seen of it."""

    __slots__ = (
        "__weakref__",
        "edited",
        "factor",
        "frame",
        "frame_address",
        "grad",
        "guarded",
        "home",
        "home_address",
        "kind",
        "name",
        "norm",
        "numel",
        "offset",
        "param",
        "section",
        "seen",
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
        self.frame: torch.Tensor
        self.frame_address = 0
        #: a view of the home that shares the parameter's version counter, and stays there while the parameter is elsewhere
        self.home: torch.Tensor
        self.home_address = 0
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
        self.states: ParamStates | None = None
        #: the runtime's states are not blank any more
        self.stepped = False

    def at_frame(self) -> bool:
        """Whether the parameter is at its frame; the caller has switched guards off."""
        return storage_address(self.param) == self.unit.frame_address

    def at_home(self) -> bool:
        """Whether the parameter is at its home; the caller has switched guards off."""
        return storage_address(self.param) == self.unit.home_address


class Visit:
    """A call of a module under way. Units list theirs: one call into C each, which an interruption cannot cut in two."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Unit:
    """The parameters that are paged together, and the state of their window."""

    __slots__ = (
        "_session",
        "arrived",
        "behind",
        "calls",
        "dirty",
        "engine_id",
        "exposed",
        "frame",
        "frame_address",
        "frame_flats",
        "frame_idle",
        "frames_seen",
        "grad",
        "grad_idle",
        "guess",
        "held",
        "home",
        "home_address",
        "home_flats",
        "home_idle",
        "home_seen",
        "inside",
        "is_open",
        "moving",
        "name",
        "neighbours",
        "on_nvme",
        "params",
        "shadow_filled",
        "spare",
        "trained",
    )

    def __init__(self, session: Session, engine_id: int, name: str) -> None:
        # Weak, so that a model's memory is given back with its last user and not at some later garbage collection.
        self._session = weakref.ref(session)
        self.engine_id = engine_id
        self.name = name
        self.params: list[ParamRef] = []
        self.neighbours: list[Unit] = []
        self.on_nvme = False
        #: its update may begin before the step
        self.spare = False
        #: how many parameters are trained, those with a gradient from this backward, and what an update that was begun started from
        self.trained = 0
        self.arrived: set[ParamRef] = set()
        self.guess: list[tuple[bool, int, int]] | None = None
        self.shadow_filled = False
        #: calls of the unit's modules under way
        self.calls: list[Visit] = []
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
        self.frame: torch.UntypedStorage
        self.home: torch.UntypedStorage
        self.frame_address = 0
        self.home_address = 0
        self.frame_flats: dict[torch.dtype, torch.Tensor] = {}
        self.home_flats: dict[torch.dtype, torch.Tensor] = {}
        self.grad: torch.UntypedStorage | None = None
        self.grad_idle = 0
        self.frame_idle = 0
        self.home_idle = 0

    @property
    def session(self) -> Session:
        """The session that the unit belongs to."""
        session = self._session()
        if session is None:
            raise RuntimeFailure("FN-E104", "the offloaded model is gone. Keep the model, or unwrap it first.")
        return session

    def frame_in_use(self) -> bool:
        """Whether anything but the runtime's own views looks at the frames."""
        return storage_uses(self.frame) > self.frame_idle + self._away()

    def home_aliased(self) -> bool:
        """Whether anything but the parameters themselves looks at the home, or may."""
        return self.exposed or storage_uses(self.home) > self.home_idle - self._away()

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
        self.inside.setdefault(threading.get_ident(), -1 - torch._C._current_graph_task_id())

    @property
    def depth(self) -> int:
        """How many calls of the unit's modules are under way."""
        return len(self.calls)

    def leave(self, call: Visit) -> None:
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

    def _away(self) -> int:
        """How many parameters are at their frames."""
        if self.moving:
            with torch._C.DisableTorchFunctionSubclass():
                return sum(ref.at_frame() for ref in self.params)
        return len(self.params) if self.is_open else 0

    def flat(self, dtype: torch.dtype, *, at_frames: bool) -> torch.Tensor:
        """Return the whole frames, or the whole home, as one dimension of a dtype."""
        flats = self.frame_flats if at_frames else self.home_flats
        if dtype not in flats:
            flats[dtype] = flats[torch.uint8].view(dtype)
            # One more view of the runtime's own.
            if at_frames:
                self.frame_idle += 1
            else:
                self.home_idle += 1
        return flats[dtype]

    def ref_at(self, offset: int) -> ParamRef | None:
        """Return the parameter that covers a byte offset of the segment."""
        for ref in self.params:
            if ref.offset <= offset < ref.offset + ref.frame.numel() * ref.frame.element_size():
                return ref
        return None


def outdate(unit: Unit) -> None:
    """Have torch refuse a backward through views that a backward with ``create_graph`` saved before the change."""
    torch.autograd.graph.increment_version(unit.frame_flats[torch.uint8])
    torch.autograd.graph.increment_version(unit.home_flats[torch.uint8])
