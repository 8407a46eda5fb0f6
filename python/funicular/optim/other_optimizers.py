"""Steps of optimizers, seen through torch's hooks on all of them.

Other optimizers' kernels may edit weights without counting (``fused=True``, extensions), and their states are in no budget. Any
optimizer may hold parameters that nothing trains any more.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from funicular.errors import RuntimeFailure, UsageError
from funicular.torch_internals.compiling import in_compiled_call
from funicular.torch_internals.overrides import unguarded
from funicular.torch_internals.trees import tree_leaves
from funicular.units.dtypes import state_bytes
from funicular.units.param import ref_of
from funicular.units.unit import UNDER_WAY, Access
from funicular.windows.faults import bring_in
from funicular.windows.lookup import owner_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from funicular.units.param import PagedParam

__all__ = ["label", "refuse_meta", "watch_optimizers"]

_log = logging.getLogger("funicular")

#: versions before the step under way
_before: weakref.WeakKeyDictionary[Any, list[tuple[PagedParam, int]]] = weakref.WeakKeyDictionary()
#: the use of weights by the compiled step under way, or by one that failed, and what ends it with the optimizer's life
_using: weakref.WeakKeyDictionary[Any, tuple[Access, weakref.finalize[..., Any]]] = weakref.WeakKeyDictionary()
#: optimizers whose user was told that their states are in no budget
_told: weakref.WeakSet[Any] = weakref.WeakSet()


def label(optimizer: Any, param: torch.Tensor) -> str:
    """Return what to call a parameter in a message: its name, or its place in the optimizer."""
    ref = ref_of(param)
    if ref is not None:
        return f"'{ref.name}'"
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            if p is param:
                names = group.get("param_names")
                where = f"parameter {index} of group {number}"
                return f"'{names[index]}'" if names else f"{where}, of shape {tuple(p.shape)}"
    return f"a parameter of shape {tuple(param.shape)}"


def refuse_meta(optimizer: Any) -> None:
    """Refuse a step over parameters without memory: they are no model's any more, and stepping them trains nothing.

    Raises
    ------
    UsageError
        ``FN-E131``.
    """
    lost = [label(optimizer, p) for group in optimizer.param_groups for p in group["params"] if _is_lost(p)]
    if lost:
        _refuse(optimizer, lost)


def _is_lost(p: torch.Tensor) -> bool:
    return ref_of(p) is None and p.is_meta


def _refuse(optimizer: Any, lost: list[str]) -> NoReturn:
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    raise UsageError(
        "FN-E131",
        f"{type(optimizer).__name__} holds parameters on the meta device ({'; '.join(lost[:3])}{more}): the model has others in "
        "their place now, and the step would train nothing. Make the optimizer anew, from model.parameters().",
    )


def _params(optimizer: Any) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _note_versions(optimizer: Any, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "counts_its_edits", False):
        return
    refs = []
    for p in _params(optimizer):
        ref = ref_of(p) if p.__dict__ else None
        if ref is not None:
            refs.append(ref)
        elif p.is_meta and p.grad is None:
            refuse_meta(optimizer)
    if refs:
        _bring_in(optimizer, refs)
        with unguarded():
            _before[optimizer] = [(ref, ref.param._version) for ref in refs]


def _bring_in(optimizer: Any, refs: list[PagedParam]) -> None:
    """Have weights at their homes, and in memory, during a compiled step: its kernels take addresses and ask nothing.

    Raises
    ------
    BudgetError
        ``FN-E205`` if ``budget.host`` has no room at once for all that lives on NVMe.
    UsageError
        ``FN-E118`` if another thread computes with them and does not end.
    """
    _end_use(optimizer)
    if not in_compiled_call():
        return
    units = dict.fromkeys(ref.unit for ref in refs)
    use = Access()
    _using[optimizer] = use, weakref.finalize(optimizer, _end, use)
    try:
        UNDER_WAY.append(use)
        for session in dict.fromkeys(owner_of(unit) for unit in units):
            bring_in(session, [unit for unit in units if unit.owner is session], use)
    except BaseException:
        _end_use(optimizer)
        raise


def _end_use(optimizer: Any) -> None:
    if optimizer not in _using:
        return
    use, end = _using.pop(optimizer)
    end()
    for unit in use.themselves:
        with contextlib.suppress(RuntimeFailure):  # the model is gone
            unit.owner.close_left(unit)


def _end(use: Access) -> None:
    if use in UNDER_WAY:
        UNDER_WAY.remove(use)


def _count_edits(optimizer: Any, args: Any, kwargs: Any) -> None:
    stepped = _before.pop(optimizer, ())
    if stepped and optimizer not in _told:
        _tell_of_states(optimizer, [ref for ref, _ in stepped])
    for ref, version in stepped:
        with unguarded():
            silent = ref.param.grad is not None and ref.param._version == version
            if silent:
                torch.autograd.graph.increment_version(ref.param)
        if silent:
            session = ref.unit.owner
            with session.lock:
                if not ref.unit.is_open:  # a window takes it home when it closes
                    session.edited(ref)
    _end_use(optimizer)


def _tell_of_states(optimizer: Any, refs: list[PagedParam]) -> None:
    """Say once of each other optimizer over an offloaded model how much memory its states take beside the budgets."""
    kept = sum(ref.numel * state_bytes(ref.home.dtype) for ref in refs if ref.trainable)
    tiers = dict.fromkeys(str(owner_of(ref.unit).policy.optimizer.tier) for ref in refs)
    _told.add(optimizer)
    _log.warning(
        "FN-W130 %s keeps %s of states over an offloaded model. They are ordinary tensors in no budget, and optimizer.tier = %r does "
        "not hold for them; the %s that the policy set aside for states stay reserved and unused. funicular.AdamW keeps its states in "
        "the tiers.",
        type(optimizer).__name__,
        _size(sum(_bytes(optimizer))),
        " and ".join(tiers),
        _size(kept),
    )


def _bytes(optimizer: Any) -> Iterator[int]:
    seen = set()
    # A dictionary whose keys are tensors has no order that pytree would accept.
    for states in optimizer.state.values():
        for value in tree_leaves(states):
            if isinstance(value, torch.Tensor) and id(value) not in seen:
                seen.add(id(value))
                yield value.nbytes


def _size(number: int) -> str:
    for unit, width in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << width:
            return f"{number / (1 << width):.2f} {unit}"
    return f"{number} B"


_watching = False


def watch_optimizers() -> None:
    """Have every optimizer's steps followed from now on; those over ordinary parameters cost a look at each."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_pre_hook(_note_versions)
        register_optimizer_step_post_hook(_count_edits)
