"""Windows: a unit's parameters are brought to their frames for its module's run, and home again.

Invariants:

- W1: outside its window a parameter is a view of its home; the home is valid and current once ``Session.access`` has returned.
- W2: frames are given up only when nothing but the runtime's own views looks at them (the storage's use count says so),
  so tensors that autograd or the user still holds stay right.
- W3: where the frames are held by others, a unit is used from its home: slower, never wrong.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from funicular._core import BACKWARD
from funicular.homes.digests import digest, look_at_frames, renew_home
from funicular.homes.edits import Inside, edit_of_shared, take_frame_edits
from funicular.homes.moved import check_places
from funicular.torch_internals.autograd import in_backward
from funicular.torch_internals.overrides import unguarded
from funicular.units.unit import Where

if TYPE_CHECKING:
    from funicular.gradients.adding import Backwards
    from funicular.homes.current import Homes
    from funicular.units.unit import Unit

__all__ = ["Windows"]


class Windows:
    """The windows of one model's units. Its methods are called with the session's lock held."""

    def __init__(self, homes: Homes, units: list[Unit], backwards: Backwards, *, poison: bool, shared: bool) -> None:
        self._homes, self._engine = homes, homes.engine
        self._units = units
        #: the backwards under way, of all threads
        self._backwards = backwards
        #: frames are digested as they are entered, so that edits are found that cannot be followed
        self._poison = poison
        #: homes are the same memory for several processes
        self._shared = shared

    def open(self, unit: Unit, phase: int) -> bool:
        """Bring a unit's parameters to their frames, for this thread; False if they must be used from their home."""
        if unit.where is Where.FRAME:
            unit.let_in()
            return True
        if unit.moving:
            self.go_home(unit)
        self._homes.before_use(unit)
        # Backward has no "module done" hook: close every idle unit here, so that its frames can be refilled.
        for other in self._units if phase == BACKWARD else unit.neighbours:
            if other.held and other.depth == 0 and other is not unit:
                self.close(other)
        # Set before anything moves: an interruption then leaves something for `recover` to finish.
        unit.begin_entering()
        # Where another thread computes with the parameters, they must not move.
        if unit.is_used_by_others() or not self._engine.open(unit.engine_id, phase, self._homes.stream()):
            unit.turn_back()
            self._homes.use_home(unit)
            return False
        unit.see_frames(None)
        with unguarded():
            for ref in unit.params:
                ref.enter_frame(digest(ref.frame) if self._poison else None)
        unit.let_in()
        unit.end_entering()
        return True

    def is_used_by_others(self, unit: Unit) -> bool:
        """Whether other threads use the parameters at their frames, so that they must stay there."""
        return unit.where is not Where.HOME and (
            unit.is_used_by_others() or unit.others_inside(self._backwards.__contains__)
        )

    def close(self, unit: Unit) -> None:
        """Bring the parameters home and give the frames up, as far as nothing looks at them and no other thread is inside."""
        if unit.where is not Where.HOME:
            # Autograd or the user holds a view: the bytes must stay. In backward so must the parameters.
            if in_backward() and unit.frame_in_use():
                return
            if self.is_used_by_others(unit):
                return
            self.go_home(unit)
        elif unit.held:
            take_frame_edits(self._homes, unit)
        if unit.held and not unit.frame_in_use():
            self._engine.release(unit.engine_id, self._homes.stream())
            unit.release_frames()
        elif unit.held:
            look_at_frames(unit)

    def go_home(self, unit: Unit) -> None:
        """Bring edits home, then the parameters. Interrupted, it can be run again."""
        check_places(self._engine, unit)
        if unit.on_nvme:
            self._homes.adopt([unit])
        interrupted = unit.begin_leaving()
        with unguarded():
            inside = Inside(self._homes, unit)
            away = [ref for ref in unit.params if not interrupted or ref.numel == 0 or not ref.at_home()]
            for ref in away:
                inside.look(ref)
            if self._shared and inside.edited:
                inside.refused = inside.refused or edit_of_shared(f"'{inside.edited[0].name}'")
                inside.edited.clear()
                self._engine.invalidate(unit.engine_id, self._homes.stream())
            for ref in inside.edited:
                ref.mark_edited()
                unit.mark_dirty(True)
            if unit.dirty and not inside.elsewhere:
                self._homes.make_room([unit])
                self._engine.write_back(unit.engine_id, self._homes.stream())
                renew_home(unit, inside.edited)
            unit.mark_dirty(False)
            for ref in away:
                ref.go_home()
        unit.end_leaving()
        inside.end()

    def close_all(self) -> None:
        """Close what is not in use: before a step, and where nothing of a forward is left."""
        for unit in self._units:
            if unit.held and unit.depth == 0:
                self.close(unit)

    def recover(self) -> None:
        """Close what this thread left open: nothing of a forward or backward is under way in it."""
        me = threading.get_ident()
        for unit in self._units:
            unit.forget_calls_of(me)
            if unit.moving and unit.depth == 0:
                self.close(unit)
        self.close_all()
