"""What units, homes, guards and gradients may ask of the session that they belong to, and of the optimizer whose states they have.

The session lies above them and implements :class:`Owner`; they know nothing else of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    import torch

    from funicular._core import Engine
    from funicular.errors import Error
    from funicular.torch_internals.saved_hooks import Pair
    from funicular.units.param import PagedParam
    from funicular.units.unit import Access, Unit

__all__ = ["HomeOwner", "Leases", "Owner", "States"]


class HomeOwner(Protocol):
    """What takes note of edits of homes."""

    @property
    def engine(self) -> Engine:
        """The runtime."""

    def stream(self) -> int:
        """Raw handle of the caller's compute stream."""

    def edited(self, ref: PagedParam) -> None:
        """Take note that a parameter was edited in its home."""

    def use_home(self, unit: Unit) -> None:
        """Make a unit's home valid and current."""


class Leases(Protocol):
    """Hooks that pack what autograd saves of parameters."""

    @property
    def local(self) -> threading.local:
        """``packed``: the calling thread has packed a lease since this was set to False."""

    def pair_outside(self) -> Pair | None:
        """Return new hooks for one operation; None where there are to be none."""


class Owner(HomeOwner, Protocol):
    """The session of an offloaded model, as it is seen from below."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    @property
    def poison(self) -> bool:
        """Whether edits are looked for where a search costs a pass over the bytes (``debug.poison``)."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held by the thread that opens and closes windows."""

    @property
    def leases(self) -> Leases:
        """Hooks that pack what autograd saves of parameters."""

    @property
    def shared(self) -> bool:
        """Whether homes and gradients are the same memory for several processes."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what all that share the memory would write alike."""

    def access(self, refs: list[PagedParam], use: Access, *, raw: bool, plain: bool) -> list[PagedParam]:
        """Make homes valid and current for an operation outside of windows; returns whose home is the operand."""

    def close_left(self, unit: Unit) -> None:
        """Close a window that had to stay open for another thread's operation."""

    def drop_unused(self) -> None:
        """Give back the memory of earlier reads that nothing looks at any more."""

    def access_grads(self, refs: list[PagedParam]) -> None:
        """Make gradients in their segments valid for the caller, all at the same time."""

    def access_grad(self, ref: PagedParam) -> None:
        """Make a gradient in its place valid for the caller."""

    def move_out(self, ref: PagedParam) -> None:
        """Give a gradient memory of its own."""

    def clip(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], guarded: type[torch.Tensor]
    ) -> Any:
        """Answer an operation of ``clip_grad_norm_`` from what is known; ``NotImplemented`` if it has to be run."""

    def clear_grad(self, ref: PagedParam, grad: torch.Tensor) -> bool:
        """Carry out ``zero_`` of a shared gradient, for this process; False if it has to be run."""

    def want_norms(self, kind: str) -> None:
        """Have the norms of gradients taken as they come, by this operation."""

    def keep_factor(self, factor: torch.Tensor) -> bool:
        """Keep a factor of gradients until the next step; False if there are too many."""


class States(Protocol):
    """The optimizer states of a parameter, while they are in the runtime."""

    def drop_unused(self) -> None:
        """Give back the memory of what was read and nothing else holds."""

    def taken(self) -> dict[str, torch.Tensor]:
        """Return them as ordinary tensors."""

    def take(self, tensors: dict[str, torch.Tensor], lost: Error | None = None) -> None:
        """Leave the runtime with these."""

    def detach(self) -> None:
        """Leave the runtime, as ordinary tensors."""

    def forget(self) -> None:
        """Leave the runtime with nothing."""
