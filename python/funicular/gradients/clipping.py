"""Gradient norms and clipping without a pass over gradients that lie in host memory.

``torch.nn.utils.clip_grad_norm_`` asks for the norm of each gradient and multiplies each by one factor. On a GPU both would go
over the link. The norms are taken as the gradients are produced, by the same operation of torch over the same values; the
factor stays pending: the update applies it with the rounding that the multiplication has, and it is applied first to a
gradient that other code looks at before or after.

Any other use, another norm, a factor on another device, more factors than one: the operation runs as it is written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funicular._core import FACTORS_PER_STEP
from funicular.homes.edits import edit_of_shared
from funicular.torch_internals.operations import FOREACH_MUL, FOREACH_NORM, ZEROING
from funicular.torch_internals.overrides import unguarded
from funicular.units.dtypes import TRAINED
from funicular.units.param import ref_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from funicular.units.param import PagedParam

__all__ = ["Clipping", "apply_pending", "effective_factor", "note_norm", "note_norms", "recognised"]

_T: Any = torch.Tensor
_VECTOR_NORM: Any = torch.linalg.vector_norm


class Clipping:
    """What clipping asked for, and what it left to be done."""

    def __init__(self) -> None:
        #: by which operation it asks for norms; they are taken as gradients come
        self.norms = ""
        #: factors pending for the next step
        self._factors: dict[int, torch.Tensor] = {}
        #: a step has taken factors for its updates, and has not ended
        self.taken = False

    def keep(self, factor: torch.Tensor) -> bool:
        """Keep a factor until the next step; False if there are too many."""
        if id(factor) not in self._factors and len(self._factors) >= FACTORS_PER_STEP:
            return False
        self._factors[id(factor)] = factor
        return True

    def stepped(self) -> None:
        """Let go of factors: updates have them."""
        self._factors.clear()


def recognised(
    func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], guarded: type[torch.Tensor]
) -> Any:
    """Answer one of the operations of ``clip_grad_norm_`` from what is known; ``NotImplemented`` for anything else."""
    if kwargs:
        return NotImplemented
    if func is FOREACH_NORM or func is _VECTOR_NORM:
        if len(args) != 2 or args[1] != 2:
            return NotImplemented
        if func is _VECTOR_NORM:
            return _known_norm(args[0], "single") if type(args[0]) is guarded else NotImplemented
        return _norms(args[0], guarded)
    if func in ZEROING:
        return _clear(args, guarded)
    if func is FOREACH_MUL or func is _T.mul_:
        grads = args[0] if func is FOREACH_MUL else [args[0]]
        if len(args) == 2 and _postpone(grads, args[1], guarded):
            return None if func is FOREACH_MUL else args[0]
    return NotImplemented


def _clear(args: Sequence[Any], guarded: type[torch.Tensor]) -> Any:
    """Clear gradients, each for itself where its place is not this process's alone."""
    grads = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
    refs = [ref_of(grad) if type(grad) is guarded else None for grad in grads]
    if len(args) != 1 or not any(ref is not None and ref.unit.owner.shared for ref in refs):
        return NotImplemented
    for ref, grad in zip(refs, grads, strict=True):
        if ref is None or not ref.unit.owner.shared:
            grad.zero_()
        elif not ref.unit.owner.clear_grad(ref, grad):
            raise edit_of_shared(f"the gradient of '{ref.name}'")
    return args[0] if grads is not args[0] else None


def _norms(tensors: Sequence[torch.Tensor], guarded: type[torch.Tensor]) -> Any:
    found = [_known_norm(t, "foreach") if type(t) is guarded else NotImplemented for t in tensors]
    if any(ref.unit.grads_on_nvme for ref in map(_living_ref, tensors) if ref is not None):
        found = [_norm_now(t) if norm is NotImplemented else norm for norm, t in zip(found, tensors, strict=True)]
    missing = [i for i, norm in enumerate(found) if norm is NotImplemented]
    if len(missing) == len(found) or any(type(tensors[i]) is guarded for i in missing):
        return NotImplemented
    if missing:
        for i, norm in zip(missing, FOREACH_NORM([tensors[i] for i in missing], 2.0), strict=True):
            found[i] = norm
    return tuple(found)


def _living_ref(grad: torch.Tensor) -> PagedParam | None:
    ref = ref_of(grad)
    return ref if ref is not None and (ref.grad is grad or ref.zeros is grad) else None


def _known_norm(grad: torch.Tensor, kind: str) -> Any:
    ref = _living_ref(grad)
    if ref is None:
        return NotImplemented
    owner = ref.unit.owner
    owner.want_norms(kind)
    if ref.norm is None and ref.factor is None and owner.shared:
        # Only a factor that stays pending can be taken there, and only where the norm is known.
        owner.access_grad(ref)
        with unguarded():
            note_norm(ref, grad, grad, kind)
    if ref.norm is None or ref.factor is not None:
        return NotImplemented
    norm, version, taken = ref.norm
    with unguarded():
        return norm if grad._version == version and taken == kind else NotImplemented


def _norm_now(grad: torch.Tensor) -> Any:
    """Take the norm of a gradient: one after the other where they live on NVMe, as memory may not hold all of them."""
    ref = _living_ref(grad)
    if ref is None:
        return NotImplemented
    ref.unit.owner.access_grad(ref)
    with unguarded():
        note_norm(ref, grad, grad, "foreach")
    assert ref.norm is not None
    return ref.norm[0]


def note_norm(ref: PagedParam, grad: torch.Tensor, home: torch.Tensor, kind: str) -> None:
    """Take the norm of a gradient that is about to leave for its home, if there is an operation to take it by."""
    note_norms([(ref, grad, home)], kind)


def note_norms(leaving: Sequence[tuple[PagedParam, torch.Tensor, torch.Tensor]], kind: str) -> None:
    """As :func:`note_norm` of each: parameter, gradient, home. Each norm has the bits that it has alone."""
    for ref, _, _ in leaving:
        ref.forget_norm()
    # Use the operation that clipping asks for: on a GPU the two differ in the last bit. It takes gradients of one type on one device together.
    if kind == "foreach":
        alike: dict[Any, list[tuple[PagedParam, torch.Tensor, torch.Tensor]]] = {}
        for one in leaving:
            alike.setdefault((one[1].dtype, one[1].device), []).append(one)
        for some in alike.values():
            norms = FOREACH_NORM([grad.detach() for _, grad, _ in some], 2.0)
            for (ref, _, home), norm in zip(some, norms, strict=True):
                ref.note_norm((norm, home._version, kind))
    elif kind:
        for ref, grad, home in leaving:
            ref.note_norm((_VECTOR_NORM(grad.detach(), 2), home._version, kind))


def _postpone(grads: Any, factor: Any, guarded: type[torch.Tensor]) -> bool:
    """Keep a factor for the update, and multiply ordinary gradients among them now; False if all have to be multiplied."""
    if (
        type(factor) is not torch.Tensor
        or factor.dim() != 0
        or factor.requires_grad
        or not isinstance(grads, (list, tuple))
    ):
        return False
    if factor.dtype not in TRAINED or torch.is_inference_mode_enabled():
        return False
    refs = []
    for grad in grads:
        if type(grad) is torch.Tensor:
            continue
        ref = _living_ref(grad) if type(grad) is guarded else None
        # A known norm says that the gradient has not been touched since it came.
        if ref is None or ref.factor is not None or ref.norm is None or grad.device != factor.device:
            return False
        with unguarded():
            if grad._version != ref.norm[1]:
                return False
        refs.append(ref)
    if not refs or not refs[0].unit.owner.keep_factor(factor):
        return False
    ordinary = [grad for grad in grads if type(grad) is torch.Tensor]
    if ordinary:
        FOREACH_MUL(ordinary, factor)
    for ref in refs:
        ref.postpone(factor)
    return True


def effective_factor(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what torch multiplies elements of ``dtype`` by, as fp32: GPUs cast a factor to their type first."""
    return factor.to(torch.float32) if factor.device.type == "cpu" else factor.to(dtype).to(torch.float32)


def apply_pending(ref: PagedParam) -> None:
    """Multiply a gradient in its segment now, since the caller looks at it. The segment is settled."""
    factor = ref.factor
    ref.forget_norm()
    if factor is None or ref.grad is None:
        return
    with torch.no_grad(), unguarded():
        ref.grad.mul_(factor)
