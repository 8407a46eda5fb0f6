"""Saved tensors that lie in frames or homes, packed as what they are a view of.

Between a unit's forward and its backward its frames may hold other bytes. A lease remembers unit and geometry instead of
the tensor; unpacking it opens the unit's window again.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.utils.checkpoint

from funicular.torch_internals.autograd import is_wrapped, unwrapped
from funicular.torch_internals.memory import storage_address
from funicular.torch_internals.operations import neg_view
from funicular.torch_internals.overrides import unguarded
from funicular.torch_internals.saved_hooks import allowed, top
from funicular.windows.signals import refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from funicular.torch_internals.saved_hooks import Pair
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit
    from funicular.windows.session import Session

__all__ = ["Lease", "LeaseHooks", "check_version"]


_CHECKPOINT = torch.utils.checkpoint.__file__


class Lease(NamedTuple):
    """A view of a parameter, without the tensor."""

    session: Session
    ref: PagedParam
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    version: int
    conjugate: bool
    negative: bool


class _Kept(NamedTuple):
    """A tensor outside of the runtime's memory, and its version when it was saved: torch does not compare versions under hooks."""

    tensor: torch.Tensor
    version: int


class _Delegated(NamedTuple):
    """Something packed by the hooks that were on the stack before ours."""

    packed: Any


class LeaseHooks:
    """The pair of saved-tensor hooks, chained over hooks that are there already, never replacing them."""

    def __init__(self) -> None:
        #: by the address at which a storage begins
        self.found: dict[int, PagedParam] = {}
        #: ``packed``: the calling thread has packed a lease since this was set to False
        self.local = threading.local()

    def add(self, unit: Unit) -> None:
        """Recognise tensors in the memory of this unit's parameters."""
        for ref in unit.params:
            if ref.numel > 0:  # without elements there is no address
                self.found[ref.frame_address] = self.found[ref.home_address] = ref

    def owner(self, tensor: torch.Tensor) -> PagedParam | None:
        """Return the parameter in whose memory a tensor lies."""
        while is_wrapped(tensor):
            tensor = unwrapped(tensor)
        try:
            if type(tensor) is torch.Tensor:
                return self.found.get(tensor.untyped_storage().data_ptr())
            return self.found.get(storage_address(tensor))
        except (RuntimeError, NotImplementedError):
            return None  # no storage: sparse tensors and the like

    def pair(self) -> Pair | None:
        """Return new hooks for :func:`push`, chained over the top of the stack; None where they are forbidden (``torch.func``).

        What is saved there keeps its frames occupied instead.
        """
        if not allowed():
            return None
        found = top()
        if not found or getattr(found[0], "__self__", None) is self:
            return self.pack, self.unpack
        return self._chained(*found)

    def pair_outside(self) -> Pair | None:
        """Return hooks for one operation outside of windows; None also where ``torch.utils.checkpoint`` counts what is saved.

        It keeps nothing of that, and wants the same number of tensors when it runs the block again. Then a window opens amid the block, and
        what comes after is saved without hooks of ours, which a ``block.forward`` that is called directly has none of.
        """
        found = top()
        code = getattr(found[0], "__code__", None) if found else None
        return None if code is not None and code.co_filename == _CHECKPOINT else self.pair()

    def _chained(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> Pair:
        def chained_pack(tensor: torch.Tensor) -> Any:
            packed = self.pack(tensor)
            return packed if isinstance(packed, Lease) else _Delegated(pack(tensor))

        def chained_unpack(packed: Any) -> torch.Tensor:
            return self.unpack(packed) if isinstance(packed, Lease) else unpack(packed.packed)

        return chained_pack, chained_unpack

    def pack(self, tensor: torch.Tensor) -> Any:
        """Replace a view of a unit's memory by a lease."""
        if is_wrapped(tensor) or tensor.is_inference():
            return tensor
        ref = self.owner(tensor)
        if ref is None:
            # Detach: a node that saves its own output would keep itself alive for ever.
            return _Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version)
        self.local.packed = True
        plain = tensor.as_subclass(torch.Tensor) if type(tensor) is not torch.Tensor else tensor
        with unguarded():
            session: Any = ref.unit.owner
            return Lease(
                session,
                ref,
                plain.dtype,
                tuple(plain.size()),
                tuple(plain.stride()),
                int(plain.storage_offset()),
                ref.param._version,
                plain.is_conj(),
                plain.is_neg(),
            )

    def unpack(self, packed: Any) -> torch.Tensor:
        """Open the window of a lease and give the view back."""
        if isinstance(packed, _Kept):
            check_version(f"{packed.tensor.type()} {list(packed.tensor.shape)}", packed.tensor, packed.version)
            return packed.tensor
        if not isinstance(packed, Lease):
            return packed  # type: ignore[no-any-return]
        ref = packed.ref
        check_version(f"{ref.name} {list(packed.size)}", ref.param, packed.version)
        refuse(packed.session, "a backward")
        # Hold the lock until the view exists: before, no use count tells another thread that the bytes are in use.
        with packed.session.lock:
            whole = ref.frame if packed.session.open_for_backward(ref.unit) else ref.home
            view = torch.as_strided(_seen_as(packed.dtype, whole), packed.size, packed.stride, packed.offset)
        if packed.conjugate:
            view = view.conj()
        return neg_view(view) if packed.negative else view


def _seen_as(dtype: torch.dtype, whole: torch.Tensor) -> torch.Tensor:
    """Return a parameter's memory in a format."""
    if dtype == whole.dtype:
        return whole
    if whole.nbytes % dtype.itemsize == 0:
        return torch.as_strided(whole, (whole.numel(),), (1,)).view(dtype)
    # What was saved begins or ends inside the parameter. This tensor has a version counter of its own.
    return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage())


def check_version(name: str, tensor: torch.Tensor, saved: int) -> None:
    """Raise what torch raises for a saved tensor that was changed since."""
    with unguarded():
        now = tensor._version
    if now != saved:
        msg = (
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{name} is at version {now}; expected version {saved} instead."
        )
        raise RuntimeError(msg)
