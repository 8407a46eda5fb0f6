"""Steps of other optimizers: their kernels may edit weights without counting (``fused=True``, extensions)."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from funicular._model import ref_of

if TYPE_CHECKING:
    from funicular._model import ParamRef

__all__ = ["watch_optimizers"]

#: versions before the step under way
_before: weakref.WeakKeyDictionary[Any, list[tuple[ParamRef, int]]] = weakref.WeakKeyDictionary()


def _note_versions(optimizer: Any, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "counts_its_edits", False):
        return
    found = (ref_of(p) for group in optimizer.param_groups for p in group["params"] if p.__dict__)
    refs = [ref for ref in found if ref is not None]
    if refs:
        with torch._C.DisableTorchFunctionSubclass():
            _before[optimizer] = [(ref, ref.param._version) for ref in refs]


def _count_edits(optimizer: Any, args: Any, kwargs: Any) -> None:
    for ref, version in _before.pop(optimizer, ()):
        with torch._C.DisableTorchFunctionSubclass():
            silent = ref.param.grad is not None and ref.param._version == version
            if silent:
                torch.autograd.graph.increment_version(ref.param)
        if silent:
            session = ref.unit.session
            with session.lock:
                if not ref.unit.is_open:  # a window takes it home when it closes
                    session.edited(ref)


_watching = False


def watch_optimizers() -> None:
    """Have every optimizer's steps followed from now on; those over ordinary parameters cost a look at each."""
    global _watching
    if not _watching:
        _watching = True
        register_optimizer_step_pre_hook(_note_versions)
        register_optimizer_step_post_hook(_count_edits)
