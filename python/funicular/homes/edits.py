"""Edits of weights that no guard saw: through views, numpy, raw addresses, kernels that do not count.

Where only the runtime's own tensors look at the bytes, there are none. Elsewhere the bytes are compared whenever the unit is about to
be used: at home as long as a view of the home lives, in the frames as long as a view outlives its window. Inside a window an edit
counts if a version counter shows it, or if the parameter itself was asked for its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funicular.errors import UsageError
from funicular.homes.digests import changed_at_home, changed_in_frames, digest, look_at_frames, look_at_home
from funicular.torch_internals.overrides import unguarded
from funicular.units.unit import Where

if TYPE_CHECKING:
    from funicular.units.owner import HomeOwner, Owner
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = [
    "Inside",
    "check_conversion",
    "check_replacement",
    "edit_of_shared",
    "note",
    "refresh_frames",
    "replace_data",
    "take_edits",
    "take_frame_edits",
    "touch",
]

_address: Any = torch.Tensor.data_ptr
_data: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def take_edits(owner: HomeOwner, unit: Unit) -> None:
    """Take note of edits outside of windows, before a unit's bytes are used."""
    if unit.where is not Where.HOME:
        return
    take_frame_edits(owner, unit)
    with unguarded():
        for ref in unit.params:
            if ref.param._version != ref.version:
                owner.edited(ref)
    for ref in changed_at_home(unit):
        owner.edited(ref)
    if not unit.home_aliased() and not unit.shadow_filled:
        unit.see_home(None)
    elif unit.shadow_filled or not unit.on_nvme:
        look_at_home(unit)


def take_frame_edits(owner: HomeOwner, unit: Unit) -> None:
    """Bring home what was edited through views that outlived their window."""
    if unit.where is not Where.HOME:
        return
    changed = changed_in_frames(unit)
    if changed:
        owner.use_home(unit)
        for ref in changed:
            _copy_home(owner, ref)
        look_at_frames(unit)


def _copy_home(owner: HomeOwner, ref: PagedParam) -> None:
    with torch.no_grad(), unguarded():
        ref.home.copy_(ref.frame)
    owner.edited(ref)


def refresh_frames(owner: HomeOwner, unit: Unit) -> None:
    """Let another thread's window, and views that outlived theirs, see what the weight is now."""
    if unit.moving or not (unit.is_open or unit.frames_seen is not None):
        return
    owner.engine.open(unit.engine_id, None, owner.stream())
    if unit.frames_seen is not None:
        look_at_frames(unit)
    for ref in unit.params:
        if ref.seen is not None:
            ref.renew_seen(digest(ref.frame))


def note(owner: Owner, before: dict[PagedParam, int], *, writes: bool) -> None:
    """After an operation outside of windows: take note of edits, and of new views of homes."""
    with owner.lock:
        with unguarded():
            for ref, version in before.items():
                # If another thread has the unit open, the version may be that thread's.
                elsewhere = ref.unit.is_open
                if ref.param._version != (version if elsewhere else ref.version) and (writes or not elsewhere):
                    owner.edited(ref)
        for unit in dict.fromkeys(ref.unit for ref in before):
            if unit.home_aliased() and not (unit.on_nvme and not unit.shadow_filled):
                look_at_home(unit)


def edit_of_shared(what: str) -> UsageError:
    """Return the error of an edit of what is the same memory for several processes: each of them would make it."""
    return UsageError(
        "FN-E722",
        f"{what} was to be edited, or replaced, and is the same memory for all ranks: each of them would do it. Several ranks train with "
        "backward, clip_grad_norm_, zero_grad and funicular.AdamW alone so far; edit weights before funicular.offload, or load a checkpoint.",
    )


def touch(ref: PagedParam) -> None:
    """Take note that the frame of a parameter is about to be reached past its version counter."""
    with ref.unit.owner.lock, unguarded():
        ref.touch(digest(ref.frame) if ref.seen is None else ref.seen)


def check_replacement(ref: PagedParam, data: torch.Tensor) -> None:
    """Refuse what would make a parameter another one.

    Raises
    ------
    UsageError
        ``FN-E115`` for another shape, order in memory, dtype or device.
    """
    home = ref.home
    if data.shape != home.shape or data.dtype != home.dtype or data.device != home.device:
        raise UsageError(
            "FN-E115",
            f"'{ref.name}' is offloaded as {tuple(home.shape)} {home.dtype} on {home.device}; it cannot become "
            f"{tuple(data.shape)} {data.dtype} on {data.device}. Call funicular.unwrap(model) first, then change it.",
        )
    if data.layout != home.layout or _order(data) != _order(home):
        raise _other_order(ref, data)


def check_conversion(ref: PagedParam, data: torch.Tensor) -> None:
    """Refuse what ``module.to(...)`` and its kin would make of a parameter, where it cannot become that.

    Raises
    ------
    UsageError
        ``FN-E115``, before anything is changed.
    """
    check_replacement(ref, data)
    if data.stride() != ref.home.stride():
        raise _other_order(ref, data)  # also where it is one of dimensions of size 1: torch chooses kernels by it
    if torch.__future__.get_overwrite_module_params_on_conversion():
        raise UsageError(
            "FN-E115",
            f"'{ref.name}' is offloaded and cannot be replaced by a new parameter, as torch.__future__."
            "set_overwrite_module_params_on_conversion(True) asks for. Switch that off, or call funicular.unwrap(model) first.",
        )


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the strides that say where elements are."""
    return (
        []
        if tensor.numel() == 0
        else [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    )


def _other_order(ref: PagedParam, data: torch.Tensor) -> UsageError:
    return UsageError(
        "FN-E115",
        f"'{ref.name}' is offloaded with strides {ref.home.stride()}; it cannot become one with strides {data.stride()}. Convert the "
        "model before funicular.offload (model.to(memory_format=...)), or copy the values with copy_.",
    )


def replace_data(ref: PagedParam, data: torch.Tensor) -> None:
    """Carry out ``p.data = t`` outside of windows, by copying into the home."""
    check_replacement(ref, data)
    if data.data_ptr() != ref.home_address:
        ref.forget_version()
        with torch.no_grad(), unguarded():
            ref.home.copy_(data)
        ref.unit.owner.edited(ref)


def _take_replacement(ref: PagedParam, data: torch.Tensor) -> None:
    """Carry out ``p.data = t`` inside a window, where no guard saw it."""
    check_replacement(ref, data)
    with torch.no_grad():
        ref.frame.data.copy_(data)  # as torch, which counts no edit here
        ref.param.data = ref.frame


class Inside:
    """What was edited while a window was open, found as it closes."""

    def __init__(self, owner: HomeOwner, unit: Unit) -> None:
        self.owner, self.unit = owner, unit
        #: homes that were edited while the unit computed from its frames
        self.elsewhere = changed_at_home(unit)
        #: frames that were edited in a way that cannot be followed; known only under ``debug.poison``
        self.hidden: list[PagedParam] = []
        self.refused: UsageError | None = None
        self.edited: list[PagedParam] = []

    def look(self, ref: PagedParam) -> None:
        """Find out about one parameter, which is away from home."""
        p = ref.param
        if ref.numel > 0 and _address(p) != ref.frame_address:
            try:
                _take_replacement(ref, _data(p))
                self.edited.append(ref)
            except UsageError as error:
                self.refused = error
                p.data = ref.frame
        elif p._version != ref.version:
            if ref not in self.elsewhere:
                self.edited.append(ref)
        elif ref.seen is not None and digest(ref.frame) != ref.seen:
            (self.edited if ref.touched else self.hidden).append(ref)

    def end(self) -> None:
        """Stop, once all is in order, if something went where it cannot count.

        Raises
        ------
        UsageError
            ``FN-E118``; ``FN-E115`` for a replacement of another shape or type.
        """
        if self.elsewhere:
            for ref in self.edited:
                _copy_home(self.owner, ref)
            for ref in self.elsewhere:
                self.owner.edited(ref)
        if self.refused is not None:
            raise self.refused
        lost = [*self.elsewhere, *self.hidden]
        if lost:
            names = ", ".join(f"'{ref.name}'" for ref in lost)
            how = "a view taken before" if self.elsewhere else "its memory, past torch's version counter,"
            raise UsageError(
                "FN-E118",
                f"{names} was edited through {how} while its module was running, which has computed without the edit or would "
                "lose it. Edit the parameter itself: with torch.no_grad(): weight.clamp_(...)",
            )
