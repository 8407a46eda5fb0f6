"""Steps of other optimizers: their kernels may edit weights without counting (``fused=True``, extensions)."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from funicular._faults import bring_in
from funicular._model import ref_of

if TYPE_CHECKING:
    from types import FrameType

    from funicular._model import ParamRef
    from funicular._session import Session

__all__ = ["watch_optimizers"]

#: where the wrapper of compiled functions lies
_WRAPPER = "torch/_dynamo/eval_frame.py"
#: versions before the step under way
_before: weakref.WeakKeyDictionary[Any, list[tuple[ParamRef, int]]] = weakref.WeakKeyDictionary()


def _note_versions(optimizer: Any, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "counts_its_edits", False):
        return
    found = (ref_of(p) for group in optimizer.param_groups for p in group["params"] if p.__dict__)
    refs = [ref for ref in found if ref is not None]
    if refs:
        _bring_in(refs)
        with torch._C.DisableTorchFunctionSubclass():
            _before[optimizer] = [(ref, ref.param._version) for ref in refs]


def _bring_in(refs: list[ParamRef]) -> None:
    """Bring weights that live on NVMe before a compiled step: its kernels take addresses and ask nothing.

    Raises
    ------
    BudgetError
        ``FN-E205`` if ``budget.host`` has no room for all of them at once.
    """
    units = dict.fromkeys(ref.unit for ref in refs if ref.unit.on_nvme)
    if units and _is_compiled():
        for session in dict.fromkeys(unit.session for unit in units):
            bring_in(session, [unit for unit in units if unit.session is session])


def _is_compiled() -> bool:
    """Whether the step under way was given to ``torch.compile``: a frame of its wrapper called it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith(_WRAPPER):
            return True
        frame = frame.f_back
    return False


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


#: sessions whose weights on NVMe a compiled step cannot just touch: on a GPU, or where they do not fit the budget together
_asking: weakref.WeakSet[Session] = weakref.WeakSet()
#: whether there is one, so that graphs of compiled steps are broken at the hooks; dynamo compares it before each call
_breaks_graphs = False


def _before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _breaks_graphs or not torch.compiler.is_dynamo_compiling():
        _note_versions(optimizer, args, kwargs)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if _breaks_graphs or not torch.compiler.is_dynamo_compiling():
        _count_edits(optimizer, args, kwargs)


# torch.compile leaves functions of this package out of its graphs, by their file. These two it may trace: then they are nothing, the
# graph itself counts what it edits, and steps compiled with fullgraph=True stay possible.
for _hook in (_before_step, _after_step):
    _hook.__code__ = _hook.__code__.replace(co_filename="<funicular: hooks of optimizers>")

_watching = False


def watch_optimizers(session: Session) -> None:
    """Have every optimizer's steps followed from now on; those over ordinary parameters cost a look at each."""
    global _breaks_graphs, _watching
    on_nvme = sum(ref.home.nbytes for unit in session.units if unit.on_nvme for ref in unit.params)
    limit, used, _ = session.engine.stats()["budgets"]["host"]
    if on_nvme and (session.device.type == "cuda" or on_nvme > (limit or 0) - used):
        _asking.add(session)
    _breaks_graphs = any(not other.closed and other.pid == session.pid for other in _asking)
    if not _watching:
        _watching = True
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
