"""Homes that are valid and current: updates are shown, what lives on NVMe is read, edits are taken note of.

What lives on NVMe is read on access, and what was read for earlier accesses makes room. Code past torch's dispatcher may touch such weights too:
the core brings them (src/memory/fault.rs), and their bytes are compared with what was brought, so that edits through that memory count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from funicular.errors import BudgetError
from funicular.homes.digests import look_at_home, renew_home
from funicular.homes.edits import refresh_frames, take_edits
from funicular.homes.moved import check_places
from funicular.torch_internals.memory import stream_of
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from funicular._core import Engine
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["Homes"]


def _nothing(*_: object) -> None:
    return None


class Homes:
    """The homes of one model's units. Its methods are called with the session's lock held."""

    def __init__(self, engine: Engine, device: torch.device, units: list[Unit]) -> None:
        self.engine = engine
        self._device = device
        self._units = units
        #: the unit whose home was made current last, for a use that may be about to begin
        self._used: Unit | None = None
        #: gives back what else was read for earlier accesses: gradients
        self.room_elsewhere: Callable[[], None] = _nothing
        #: raises for an edit that must not be
        self.refuse: Callable[[PagedParam], None] = _nothing

    def stream(self) -> int:
        """Raw handle of the caller's compute stream."""
        return stream_of(self._device)

    # ------------------------------------------------------------------ uses

    def use_home(self, unit: Unit) -> None:
        """Make a unit's home current, for use where its frames are not to be had."""
        self._used = unit
        self.engine.settle(unit.engine_id, self.stream())
        self.fault_in([unit])

    def end_use(self) -> None:
        """Take note that the use of the home that was made current last has begun, or is over."""
        self._used = None

    def before_use(self, unit: Unit) -> None:
        """Take note of edits that went past the guard, before the frames are filled."""
        check_places(self.engine, unit)
        if unit.behind:
            self.catch_up(unit)
        if unit.on_nvme:
            self.adopt([unit])
        take_edits(self, unit)
        self._retire_shadow(unit)

    # ------------------------------------------------------------------ edits and updates

    def edited(self, ref: PagedParam) -> None:
        """Note that a parameter was edited in its home."""
        self.refuse(ref)
        ref.mark_edited()
        if ref.unit.on_nvme:
            self.engine.store_shadow(ref.unit.engine_id, self.stream())
        self.engine.invalidate(ref.unit.engine_id, self.stream())
        # Last: until then the edit counts as not yet seen.
        with unguarded():
            ref.note_version()
        renew_home(ref.unit, [ref])
        refresh_frames(self, ref.unit)

    def catch_up(self, unit: Unit) -> None:
        """Show an update of the home to those who look at it."""
        self.engine.settle(unit.engine_id, self.stream())
        if unit.on_nvme and unit.shadow_filled:
            # Tensors look at the old bytes: bring the new ones to the same addresses.
            self.engine.refresh_shadow(unit.engine_id, self.stream())
        if unit.on_nvme and not unit.shadow_filled:
            unit.see_home(None)
        renew_home(unit, unit.params)
        refresh_frames(self, unit)
        unit.catch_up()

    # ------------------------------------------------------------------ weights on NVMe

    def fault_in(self, units: Iterable[Unit]) -> None:
        """Read what lives on NVMe; what was read for earlier accesses makes room."""
        for unit in units:
            if unit.behind:
                self.catch_up(unit)
        self.adopt(units)
        missing = [unit for unit in units if unit.on_nvme and not unit.shadow_filled]
        if not missing:
            return
        self.make_room(units)
        for unit in missing:
            self._fetch(unit, keep=units)

    def adopt(self, units: Iterable[Unit]) -> None:
        """Take note of units whose weights were brought because something touched them."""
        for unit in units:
            if unit.on_nvme and not unit.shadow_filled:
                brought = self.engine.adopt_fault(unit.engine_id)
                if brought is not None:
                    unit.fill_shadow(brought)

    def _fetch(self, unit: Unit, *, keep: Iterable[Unit]) -> None:
        """Read a unit's weights from NVMe; what was read earlier makes room, but not these units."""
        try:
            try:
                self.engine.fault_in(unit.engine_id, self.stream())
            except BudgetError:
                self.drop_unused(keep=keep)
                self.engine.fault_in(unit.engine_id, self.stream())
            self.adopt([unit])  # something may have touched it just now
            # Its address may be known to code that does not tell of its edits.
            look_at_home(unit)
            unit.fill_shadow(unit.home_seen)
        except BaseException:
            unit.discard_shadow(self.engine)
            raise

    def make_room(self, units: Iterable[Unit]) -> None:
        """Give back the memory of earlier reads that nothing looks at any more, but not that of these units."""
        self.adopt(self._units)
        for unit in self._units:
            if unit.shadow_filled and unit.depth == 0 and unit not in units and unit is not self._used:
                self.before_use(unit)

    def drop_unused(self, *, keep: Iterable[Unit] = ()) -> None:
        """Give back the memory of all earlier reads, of weights and of optimizer states, that nothing looks at any more."""
        self.make_room(keep)
        for unit in self._units:
            for ref in unit.params:
                if ref.states is not None:
                    ref.states.drop_unused()
        self.room_elsewhere()

    def _retire_shadow(self, unit: Unit) -> None:
        if unit.shadow_filled and not unit.is_read() and not unit.home_aliased():
            unit.discard_shadow(self.engine)
