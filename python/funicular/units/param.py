"""Parameters of units: where their bytes are, and what was last seen of them.

What changes of a parameter is written by its own methods alone (tests/tidy.rs), but for ``states``: the optimizer's states write it in one
statement with their own fields, which no interruption cuts in two.
"""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from funicular.torch_internals.memory import same_storage

if TYPE_CHECKING:
    from funicular.units.owner import States
    from funicular.units.unit import Access, Unit

__all__ = ["Link", "PagedParam", "link", "ref_of"]


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
        "came",
        "edited",
        "expected",
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
        "shown",
        "stand_in",
        "start",
        "states",
        "stepped",
        "sum",
        "touched",
        "trainable",
        "unit",
        "version",
        "version_before",
        "views",
        "window",
        "zeros",
    )

    def __init__(
        self,
        param: torch.nn.Parameter,
        name: str,
        unit: Unit,
        place: tuple[int, int, int, int],
        classes: tuple[type[torch.nn.Parameter], type[torch.nn.Parameter]],
    ) -> None:
        # Strong, so that the counts of who shares a storage stay comparable.
        self.param = param
        self.name = name
        #: its class when it is not offloaded, outside its window, and inside
        self.kind: type[torch.nn.Parameter] = type(param)
        self.guarded, self.window = classes
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
        #: how many gradients have been added up since the last step, and how many had been then
        self.came = 0
        self.expected = 0
        #: norm of the gradient when it came, the version of its place then, and the operation that gave it
        self.norm: tuple[torch.Tensor, int, str] | None = None
        #: what the gradient is yet to be multiplied by
        self.factor: torch.Tensor | None = None
        #: a copy of the gradient on the device, for autograd to add to; the version that it has; and the number under which it comes up, if
        #: no interruption kept it from being known
        self.sum: tuple[torch.Tensor, int, int | None] | None = None
        #: what the parameter's gradient is instead of the place, which is not this process's alone, after it was cleared in place
        self.zeros: torch.Tensor | None = None
        #: a copy that the parameter's gradient is instead of either, multiplied as it is yet to be
        self.shown: torch.Tensor | None = None
        self.trainable = param.requires_grad
        #: the parameter's version when its edits were last taken note of
        self.version = -1
        #: the parameter's version when it was offloaded
        self.version_before = -1
        #: edited since its last step: its next master starts from it
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

    # ------------------------------------------------------------------ where its bytes are

    def lay_out(
        self, storages: tuple[torch.UntypedStorage, torch.UntypedStorage], frame: torch.Tensor, home: torch.Tensor
    ) -> None:
        """Take tensors over its frame and its home, and their storages."""
        self.frame_storage, self.home_storage = storages
        self.frame, self.home = frame, home
        self.frame_address, self.home_address = frame.data_ptr(), home.data_ptr()

    def share_version(self, stand_in: torch.nn.Parameter, frame: torch.Tensor, home: torch.Tensor) -> None:
        """Take tensors over frame and home that count versions with the parameter."""
        # First: an interruption finds a stand-in wherever the rest has been done.
        self.stand_in = stand_in
        self.frame, self.home = frame, home

    def lay_gradient(self, storage: torch.UntypedStorage | None) -> None:
        """Take the storage of its gradient's place."""
        self.grad_storage = storage

    def give_gradient(self, grad: torch.Tensor) -> None:
        """Take a tensor over its gradient's place."""
        self.grad = grad

    def stand_for_zeros(self, zeros: torch.Tensor | None) -> None:
        """Take what stands for a gradient that was cleared in place; None: the place counts."""
        self.zeros = zeros

    def show(self, shown: torch.Tensor | None) -> None:
        """Take a copy of the gradient that is shown to the program; None: there is none any more."""
        self.shown = shown

    def add_view(self, view: torch.Tensor) -> None:
        """Remember a view of the gradient's place that is handed out."""
        self.views = [view for view in self.views if view() is not None]
        self.views.append(weakref.ref(view))

    def move_in(self, grad: torch.Tensor | None) -> None:
        """Make the parameter a view of its home; the caller has switched no guard off, as there is none yet."""
        p = self.param
        self.version_before = p._version
        # Nothing is called in between: an interruption finds all of it or nothing.
        p.grad = None
        p.data = self.home
        p.grad = grad
        self.version = p._version
        p.__class__ = self.guarded

    def enter_frame(self, seen: int | None) -> None:
        """Move the parameter to its frame, whose digest is known where other code may edit it unseen."""
        self.seen, self.touched = seen, False
        self.param.data = self.frame
        self.param.__class__ = self.window

    def go_home(self) -> None:
        """Move the parameter to its home; its edits are taken note of."""
        self.version = self.param._version
        self.param.data = self.home
        self.param.__class__ = self.guarded
        self.seen = None

    # ------------------------------------------------------------------ what was seen of it

    def note_version(self) -> None:
        """Take note of the parameter's version: what was edited until now is known. The caller has switched guards off."""
        self.version = self.param._version

    def forget_version(self) -> None:
        """Have the parameter count as edited, and that not known yet."""
        self.version = -1

    def mark_edited(self, edited: bool = True) -> None:
        """Have the next master start from the parameter, or not."""
        self.edited = edited

    def note_step(self) -> None:
        """Count a version for a step that the runtime has taken. The caller has switched guards off."""
        torch.autograd.graph.increment_version(self.param)
        self.version = self.param._version
        self.edited, self.stepped = False, True

    def note_loaded(self, edited: bool) -> None:
        """Take note that the runtime's states were loaded."""
        self.stepped, self.edited = True, edited

    def touch(self, seen: int) -> None:
        """Take note that the frame, whose digest this is, is about to be reached past the version counter."""
        self.seen, self.touched = seen, True

    def renew_seen(self, seen: int) -> None:
        """Take another digest of the frame: its edits are known."""
        self.seen = seen

    def begin_sum(self) -> None:
        """Take note that the next gradient is the first."""
        self.came = 0

    def note_gradient(self) -> None:
        """Take note that a gradient has come to its place."""
        self.came += 1

    def end_sum(self) -> None:
        """Take note of a step: the next one is expected after as many gradients."""
        self.expected, self.came = self.came, 0

    @property
    def last_comes(self) -> bool:
        """Whether the gradient that is coming is the last one expected before the step."""
        return self.came + 1 >= self.expected

    def fetch_sum(self, fetched: tuple[torch.Tensor, int, int | None] | None) -> None:
        """Take the copy of the gradient that autograd is to add to; None: there is none."""
        self.sum = fetched

    # ------------------------------------------------------------------ clipping

    def note_norm(self, norm: tuple[torch.Tensor, int, str]) -> None:
        """Take the norm of a gradient that has come."""
        self.norm = norm

    def forget_norm(self) -> None:
        """Forget the norm, and what the gradient is yet to be multiplied by: it is another now, or may be."""
        self.norm = self.factor = None

    def postpone(self, factor: torch.Tensor) -> None:
        """Keep what the gradient is yet to be multiplied by."""
        self.factor = factor

    # ------------------------------------------------------------------ questions

    def at_frame(self) -> bool:
        """Whether the parameter is at its frame; the caller has switched guards off."""
        return same_storage(self.param, self.frame_storage)

    def gradient_is_read(self, under_way: list[Access]) -> bool:
        """Whether another thread is amid an operation on what is in the gradient's place."""
        me = get_ident()
        return bool(under_way) and any(use.thread != me and self in use.gradients for use in list(under_way))

    def at_home(self) -> bool:
        """Whether the parameter is at its home; the caller has switched guards off."""
        return same_storage(self.param, self.home_storage)
