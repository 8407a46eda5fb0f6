"""Tensors over the runtime's memory, and what somebody else may do to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from funicular._errors import UsageError
from funicular._model import storage_address

if TYPE_CHECKING:
    from funicular._model import ParamRef, Unit
    from funicular._session import Session

__all__ = ["check_places", "tensor_over", "view_of"]


class _Capsule:
    """What ``torch.from_dlpack`` takes, around a capsule."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, stream: int | None = None, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def tensor_over(capsule: Any) -> torch.Tensor:
    """Return the bytes of one of the runtime's buffers."""
    return from_dlpack(_Capsule(capsule))


def view_of(flat: torch.Tensor, ref: ParamRef, p: torch.Tensor) -> torch.Tensor:
    """Return a parameter's part of frames or home, in its shape."""
    return torch.as_strided(flat, p.size(), p.stride(), ref.offset // p.element_size())


def check_places(session: Session, unit: Unit) -> None:
    """Look whether the tensors over a unit's frames and home still are: torch moves a storage that is shared with a process.

    Raises
    ------
    UsageError
        ``FN-E115`` if one was moved. It is put right: the weights are as they were, and the other side has a copy.
    """
    home, frame = unit.home_flats[torch.uint8], unit.frame_flats[torch.uint8]
    if home.data_ptr() == unit.home_address and frame.data_ptr() == unit.frame_address:
        return
    with torch.inference_mode(mode=False), torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        _renew(session, unit)
    raise UsageError(
        "FN-E115",
        f"weights of '{unit.name}' were moved to shared memory: sent to another process, or by share_memory_(). That is a copy "
        "now, and the model goes on without it. Send clones: {name: value.clone() for name, value in model.state_dict().items()}.",
    )


def _renew(session: Session, unit: Unit) -> None:
    # By where the frames' storage is now.
    moved = unit.frame_flats[torch.uint8].data_ptr()
    away = [ref for ref in unit.params if storage_address(ref.param) == moved]
    frame = tensor_over(session.engine.frame_buffer(unit.engine_id))
    home = tensor_over(session.engine.home_buffer(unit.engine_id, True))
    unit.frame, unit.frame_flats = frame.untyped_storage(), {torch.uint8: frame}
    unit.home, unit.home_flats = home.untyped_storage(), {torch.uint8: home}
    for ref in unit.params:
        p = ref.param
        ref.frame = view_of(unit.flat(p.dtype, at_frames=True), ref, ref.home)
        p.data = view_of(unit.flat(p.dtype, at_frames=False), ref, ref.home)
        ref.home = p.detach()
    unit.frame_idle, unit.home_idle = (int(torch._C._storage_Use_Count(s._cdata)) for s in (unit.frame, unit.home))
    for ref in away:
        ref.param.data = ref.frame
