"""The gradients of a backward, from their arrival to their places."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from funicular.errors import RuntimeFailure
from funicular.gradients.adding import Backwards
from funicular.gradients.arrival import Landing, bring_down, bring_home, is_foreign
from funicular.gradients.clipping import Clipping, apply_pending
from funicular.gradients.paged import PagedGradients, is_held
from funicular.gradients.speculation import Speculation
from funicular.gradients.sums import Sums
from funicular.torch_internals.autograd import backward_task
from funicular.torch_internals.memory import stream_of
from funicular.units.unit import GRADIENTS_UNDER_WAY

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from funicular._core import Engine
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["Gradients"]


class Gradients:
    """The gradients of one model's units."""

    def __init__(self, engine: Engine, device: torch.device, *, sums_up: bool) -> None:
        self._engine = engine
        self._device = device
        self.clipping = Clipping()
        self.backwards = Backwards()
        self.speculation = Speculation(engine, self.backwards)
        self.sums = Sums(engine, self.backwards, wanted=sums_up)
        self._paged = PagedGradients(engine, self.backwards)
        self._landing = Landing(engine, self.backwards)
        #: parameters whose gradients stay there until the states of their units are made, in the order in which they came
        self._held_back: deque[PagedParam] = deque()

    def know(self, units: list[Unit]) -> None:
        """Take note of the units, before the first backward."""
        self._paged.know(units)
        if self._paged:
            # To take them later is a read of each gradient.
            self.clipping.norms = "foreach"

    def make_room(self) -> None:
        """Give back memory of gradients that live on NVMe."""
        self._paged.make_room(stream_of(self._device))

    def arrived(self, ref: PagedParam | None) -> None:
        """Take note that autograd accumulated into a gradient; bring down the one before."""
        # One behind, so that the user's own hooks on the parameter have run.
        self._come_down(wait=False)
        if ref is not None:
            self.backwards.added(backward_task(), ref)

    @property
    def pending(self) -> bool:
        """Whether gradients have come that :meth:`bring_down` would send to their places."""
        return bool(self._held_back) or self.backwards.pending

    def bring_down(self) -> None:
        """Send all gradients that have come to their places."""
        self._come_down(wait=True)

    def _come_down(self, *, wait: bool) -> None:
        """Send gradients to their places; without ``wait`` those of one unit may stay on the device while states are made from older ones."""
        self._held_back.extend(ref for ref in self.backwards.passed() if ref.grad is not None)
        while self._held_back:
            ref = self._held_back[0]
            if not wait and ref.unit is self._held_back[-1].unit and self._engine.update_unmade(ref.unit.engine_id):
                return
            self._held_back.popleft()
            if self.backwards.at(ref):
                continue  # another backward is at it, and brings it down
            stream = stream_of(self._device)
            if bring_down(self._landing, ref, stream, self.clipping.norms):
                self.speculation.arrived(ref, stream)
            self._landing.reap(stream)

    def opened(self, unit: Unit) -> bool:
        """Take note that backward is about to need a unit's parameters; whether :meth:`backward_ended` has to follow for that."""
        return self.sums.opened(unit, stream_of(self._device))

    def about_to_add(self, ref: PagedParam) -> bool:
        """Take note that the backward under way is about to add to a gradient. False if another one is, which has made it ready."""
        alone = not self.backwards.adds_to(ref)
        self.backwards.about_to_add(backward_task(), ref)
        return alone

    def before_accumulate(self, ref: PagedParam) -> None:
        """Make valid what autograd is about to add to: a copy of the gradient, or the gradient in its place."""
        if ref.param.grad is None:
            ref.begin_sum()
        if ref.param.grad is not ref.grad:
            return
        if self.sums.take(ref, stream_of(self._device)):
            self.speculation.drop(ref.unit)
        else:
            ref.unit.owner.access_grad(ref)

    def lift(self, ref: PagedParam) -> bool:
        """Have autograd add on the device to a gradient that lives on NVMe, where that is possible."""
        if self.clipping.taken and ref.factor is not None:
            return False
        lifted = self._paged.lift(ref, stream_of(self._device))
        if lifted:
            self.speculation.drop(ref.unit)
        return lifted

    def settle(self, ref: PagedParam, beside: list[PagedParam]) -> None:
        """Make a gradient in its place valid for the caller, who may change it, and looks at the others ``beside`` it too.

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
        if ref.unit.grads_on_nvme:
            self._paged.bring(ref.unit, stream, keep={other.unit for other in beside})
        # Not every operation that changes a tensor says so: what looks at it may have changed it.
        self.speculation.drop(ref.unit)
        apply_pending(ref)

    def watched(self, task: int, ending: Any) -> None:
        """Take note of a backward, and of what autograd calls at its end."""
        self.backwards.begin(task, ending)

    def join(self) -> None:
        """Wait until all who train the model are at their step."""

    def drop_unfinished(self) -> None:
        """Have no gradient that a backward that failed has left between two places."""

    def closing(self) -> None:
        """Before the model ends."""

    def clear(self, ref: PagedParam, grad: torch.Tensor) -> bool:
        """Carry out ``grad.zero_()``; False if it has to be run as it is written."""
        return False

    def take_back(self, ref: PagedParam) -> None:
        """Raise if a gradient is another than the one that all have exchanged."""

    def to_step(self, grads: Mapping[PagedParam, torch.Tensor]) -> None:
        """Have in their places what a step is to use."""
        bring_home(grads)

    @staticmethod
    def is_read(grads: Mapping[PagedParam, torch.Tensor]) -> bool:
        """Whether other threads look at places that a step has to fill with these."""
        return bool(GRADIENTS_UNDER_WAY) and any(
            is_foreign(ref, grad) and ref.gradient_is_read(GRADIENTS_UNDER_WAY) for ref, grad in grads.items()
        )

    def forget_factors(self, grads: Mapping[PagedParam, torch.Tensor]) -> None:
        """Multiply older gradients in places that a step is about to fill with these, for those who hold them, or forget by what."""
        for ref, grad in grads.items():
            if ref.factor is not None and is_foreign(ref, grad):
                if is_held(ref, own=False):
                    self.settle(ref, [ref])
                ref.forget_norm()

    def await_readers(self, grads: Mapping[PagedParam, torch.Tensor]) -> None:
        """Wait until they do not. The session's lock is not held: what they are amid may need it."""
        while self.is_read(grads):
            time.sleep(0.0005)

    def backward_ended(self, task: int) -> None:
        """Have all gradients in their places, as the compute stream sees them."""
        self.backwards.end(task)  # what it was at last is taken from it, whichever thread of autograd's was there
        self.bring_down()
        stream = stream_of(self._device)
        self.sums.backward_ended(stream)
        self._landing.finish(stream)
        self._paged.flush()
