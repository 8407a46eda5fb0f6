"""The gradients of a backward, from their arrival to their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular.errors import RuntimeFailure
from funicular.gradients.arrival import Landing, bring_down
from funicular.gradients.clipping import Clipping, apply_pending
from funicular.gradients.speculation import Speculation
from funicular.torch_internals.memory import stream_of

if TYPE_CHECKING:
    import torch

    from funicular._core import Engine
    from funicular.units.param import PagedParam

__all__ = ["Gradients"]


class Gradients:
    """The gradients of one model's units."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self.clipping = Clipping()
        self.speculation = Speculation(engine)
        self._landing = Landing(engine)
        #: the parameter whose gradient came last, and is still where autograd put it
        self._arrived: PagedParam | None = None

    def arrived(self, ref: PagedParam | None) -> None:
        """Take note that autograd accumulated into a gradient; bring down the one before."""
        # One behind, so that the user's own hooks on the parameter have run.
        self.bring_down()
        self._arrived = ref

    def bring_down(self) -> None:
        """Send the gradient that came last to its place."""
        ref, self._arrived = self._arrived, None
        if ref is None or ref.grad is None:
            return
        stream = stream_of(self._device)
        if bring_down(self._landing, ref, stream, self.clipping.norms):
            self.speculation.arrived(ref, stream)
        self._landing.reap(stream)

    def settle(self, ref: PagedParam) -> None:
        """Make a gradient in its place valid for the caller, who may change it.

        Raises
        ------
        RuntimeFailure
            ``FN-E106`` to a signal handler amid a step that multiplies this gradient: it would be multiplied twice.
        """
        if self.clipping.taken and ref.factor is not None:
            raise RuntimeFailure(
                "FN-E106",
                f"the gradient of '{ref.name}' was asked for by a signal handler amid a step, which multiplies it by the factor of "
                "clipping. Set a flag in the handler, and look at gradients between steps.",
            )
        stream = stream_of(self._device)
        self._engine.settle_update(ref.unit.engine_id, stream)
        self._engine.wait_gradients(stream)
        # Not every operation that changes a tensor says so: what looks at it may have changed it.
        self.speculation.drop(ref.unit)
        apply_pending(ref)

    def backward_ended(self) -> None:
        """Have all gradients in their places, as the compute stream sees them."""
        self.bring_down()
        self._landing.finish(stream_of(self._device))
