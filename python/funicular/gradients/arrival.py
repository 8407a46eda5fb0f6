"""Gradients and the places they are brought to, also while other tensors look at one of the two.

In plain PyTorch a new gradient has new memory, so a tensor made of an old one keeps its values. Here the place is used
again: a tensor that still looks at it is moved to memory of its own first. Views are known, because they are guarded as
the gradient is; raw aliases are given ordinary memory from the start.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from funicular.errors import BudgetError, RuntimeFailure
from funicular.gradients.clipping import note_norm
from funicular.gradients.paged import others_wanted
from funicular.guard.classes import GuardedGrad
from funicular.torch_internals.memory import storage_uses, tensor_uses
from funicular.torch_internals.overrides import unguarded
from funicular.units.param import link, ref_of
from funicular.units.unit import GRADIENTS_UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from funicular._core import Engine
    from funicular.gradients.adding import Backwards
    from funicular.units.param import PagedParam

__all__ = ["Landing", "bring_down", "bring_home", "is_foreign", "make_grad", "move_out", "place_for", "rebase"]


def make_grad(ref: PagedParam) -> torch.Tensor:
    """Build the tensor over the gradient's place."""
    storage, home = ref.grad_storage, ref.home
    assert storage is not None
    # Not by slicing: autograd's notes on views would keep tensors that look at the place.
    grad = torch.empty(0, dtype=home.dtype, device=storage.device)
    grad.set_(storage, 0, home.size(), home.stride())
    grad.__class__ = GuardedGrad
    link(grad, ref)
    return grad


def place_for(ref: PagedParam) -> torch.Tensor:
    """Return the tensor over a gradient's place, for a new gradient: no other tensor looks at the place any more.

    Raises
    ------
    RuntimeFailure
        ``FN-E119`` if something that cannot be moved still does.
    """
    # Two references are expected: the attribute and the argument of getrefcount.
    if sys.getrefcount(ref.grad) > 2 or (ref.views and any(view() is not None for view in ref.views)):
        ref.unit.owner.access_grad(ref)
        move_out(ref)
    assert ref.grad_storage is not None
    assert ref.grad is not None
    if storage_uses(ref.grad_storage) > ref.unit.grad_idle:
        raise RuntimeFailure(
            "FN-E119",
            f"something looks at the old gradient of '{ref.name}' in a way that cannot be followed. "
            "Keep a clone: p.grad.clone().",
        )
    return ref.grad


class Landing:
    """Gradients on their way down, kept until their copies are over: no more than those of two of the largest units."""

    def __init__(self, engine: Engine, backwards: Backwards) -> None:
        self._engine, self._backwards = engine, backwards
        #: gradient, and the number of its copy, or None where an interruption kept it from being known
        self._queue: deque[list[Any]] = deque()
        self._most = 0

    def send(self, ref: PagedParam, grad: torch.Tensor, stream: int, at: int = 0) -> None:
        """Begin the copy of a gradient to its place, or of a part of it that begins ``at`` this element."""
        self._most = max(self._most, 2 * ref.unit.nbytes)
        under_way: list[Any] = [grad, None]
        self._queue.append(under_way)  # before: nothing may free what is being copied
        keep = not ref.unit.grads_on_nvme or others_wanted(ref, self._backwards)
        where = (ref.unit.engine_id, ref.offset + at * grad.element_size(), grad.data_ptr(), grad.nbytes, stream, keep)
        try:
            under_way[1] = self._engine.gradient(*where)
        except BudgetError:
            # Others of its unit, which live on NVMe, have to be in memory beside it.
            ref.unit.owner.drop_unused()
            under_way[1] = self._engine.gradient(*where)

    def finish(self, stream: int) -> None:
        """Have ``stream`` wait for all copies, and let go of all gradients."""
        self._engine.wait_gradients(stream)
        self._reap(stream, 0)

    def reap(self, stream: int) -> None:
        """Drop gradients whose copies are over; ``stream`` waits for the oldest as long as there are too many."""
        self._reap(stream, self._most)

    def _reap(self, stream: int, most: int) -> None:
        left = sum(grad.nbytes for grad, _ in self._queue)
        while self._queue:
            grad, copy = self._queue[0]
            if copy is None:
                self._engine.wait_gradients(stream)
            elif not self._engine.landed(copy):
                if left <= most:
                    return
                self._engine.wait_landed(copy, stream)
            left -= grad.nbytes
            self._queue.popleft()


def bring_down(landing: Landing, ref: PagedParam, stream: int, norms: str) -> bool:
    """Send a new gradient to its place, and make that the parameter's gradient; False if it stays an ordinary tensor.

    ``norms``: the operation that takes norms of gradients, if any is wanted.
    """
    p = ref.param
    with unguarded():
        grad = p.grad
        if grad is None:
            return False
        if grad is ref.grad:
            # Added to in its place. Its norm is a pass over it: taken where it will be asked for, so that clipping need not touch it. The
            # memory of one that lives on NVMe may be given back by now.
            note_norm(ref, grad, grad, norms if ref.last_comes and not ref.unit.grads_on_nvme else "")
            return True
        if grad.requires_grad or grad.layout != torch.strided:
            return False
        if grad.dtype != ref.home.dtype or grad.device != ref.home.device or type(grad) is not torch.Tensor:
            return False
        if _is_kept(_holders(grad)) or ref.gradient_is_read(GRADIENTS_UNDER_WAY):
            return False  # its holder may go on to edit it; or the place is looked at, and the step waits for that
        place, came = place_for(ref), grad
        if grad.stride() != ref.home.stride():
            grad = torch.empty_like(ref.frame).copy_(grad)
        note_norm(ref, grad, place, norms)
        landing.send(ref, grad, stream)
        if p.grad is not came:
            return False  # another thread, or a signal handler, has cleared it meanwhile
        p.grad = place
    return True


def is_foreign(ref: PagedParam, grad: torch.Tensor) -> bool:
    """Whether a gradient has to be copied to its place for a step. One that has come there since the step saw it need not be."""
    return ref.grad is not None and grad is not ref.grad and ref.param.grad is not ref.grad


def bring_home(grads: Mapping[PagedParam, torch.Tensor]) -> None:
    """Make sure that the gradients to be used by a step are the ones in their places."""
    foreign = [(ref, grad) for ref, grad in grads.items() if is_foreign(ref, grad)]
    # One parameter's place may be another's gradient: all are read before any is written.
    taken = [(ref, g.detach().clone() if ref_of(g) is not None else g.detach()) for ref, g in foreign]
    for ref, grad in taken:
        ref.unit.owner.access_grad(ref)
        place = place_for(ref)
        with unguarded():
            place.copy_(grad)


def move_out(ref: PagedParam, factor: torch.Tensor | None = None) -> None:
    """Give a gradient, and all views of it, memory of its own with the same values, or multiplied. Its place must be settled."""
    grad = ref.grad
    assert grad is not None
    with torch.inference_mode(mode=False), torch.no_grad(), unguarded():
        copy = grad.detach().clone()
        if factor is not None:
            copy.mul_(factor)
        living = [view() for view in ref.views]
        for tensor in (grad, *living):
            if tensor is not None:
                rebase(tensor, copy)
        ref.views.clear()
        ref.give_gradient(make_grad(ref))


def rebase(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Have a tensor over a gradient's place, or a view of it, look at the same elements of other memory, as an ordinary tensor."""
    moved = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    moved.set_(copy.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    tensor.data = moved
    tensor.__class__ = torch.Tensor
    del tensor._funicular_ref  # type: ignore[attr-defined]


def _holders(gradient: torch.Tensor) -> tuple[int, int, int]:
    """Return how many hold a gradient: references in Python, in C++, and tensors over its memory if all of it is its own."""
    storage = gradient.untyped_storage()
    whole = storage.nbytes() == gradient.numel() * gradient.element_size()
    return sys.getrefcount(gradient), tensor_uses(gradient), storage_uses(storage) if whole else 0


class _Sample(threading.local):
    """A gradient that only its parameter holds; each thread has its own, since another thread's reference would count."""

    def __init__(self) -> None:
        self.parameter = torch.nn.Parameter(torch.zeros(1, device="cpu"))
        self.parameter.grad = torch.zeros(1, device="cpu")


_sample = _Sample()


def _holders_of_a_new_one() -> tuple[int, int, int]:
    """Return the counts of a gradient that only its parameter holds: a compiler or debugger adds references to each call."""
    gradient = _sample.parameter.grad
    assert gradient is not None
    return _holders(gradient)


def _is_kept(found: tuple[int, int, int]) -> bool:
    """Whether anything holds a gradient besides its parameter and one variable."""
    new = _holders_of_a_new_one()
    return found[0] > new[0] or found[1] > new[1] or found[2] > new[2]
