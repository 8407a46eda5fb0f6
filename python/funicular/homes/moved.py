"""Tensors over the runtime's memory, and what other libraries may do to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from funicular.errors import UsageError
from funicular.torch_internals.memory import address_of, make_subclass
from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from funicular._core import Engine
    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["build_places", "check_places", "share_version", "tensor_over"]


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


def build_places(engine: Engine, ref: PagedParam) -> None:
    """Make the tensors over a parameter's frame, home and gradient."""
    p, unit = ref.param, ref.unit.engine_id
    part = (ref.offset, ref.numel * p.element_size())
    frame = tensor_over(engine.frame_buffer(unit, part)).untyped_storage()
    home = tensor_over(engine.home_buffer(unit, True, part)).untyped_storage()
    ref.lay_out((frame, home), _place(p, frame), _place(p, home))
    if p.requires_grad:
        ref.lay_gradient(tensor_over(engine.grad_buffer(unit, part)).untyped_storage())


def _place(p: torch.Tensor, storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a tensor over a storage, in the parameter's shape."""
    tensor = torch.empty(0, dtype=p.dtype, device=storage.device)
    return tensor.set_(storage, 0, p.size(), p.stride())


def share_version(ref: PagedParam) -> None:
    """Let the tensors over a parameter's frame and home count versions with it: an edit of one is an edit of all."""
    p = ref.param
    frame, home = torch.Tensor.detach(p), torch.Tensor.detach(p)
    frame.data, home.data = ref.frame, ref.home
    ref.share_version(make_subclass(torch.nn.Parameter, home, p.requires_grad), frame, home)


def check_places(engine: Engine, unit: Unit) -> None:
    """Check that the tensors over a unit's frames and homes still are there: torch moves a storage that it shares with a process.

    Raises
    ------
    UsageError
        ``FN-E115`` if one was moved. It is put right: the weights are as they were, and the other side has a copy.
    """
    if list(map(address_of, unit.storages)) == unit.addresses:
        return
    with torch.inference_mode(mode=False), torch.no_grad(), unguarded():
        moved = [ref for ref in unit.params if _has_moved(ref)]
        for ref in moved:
            _renew(engine, ref)
        unit.note_storages()
    names = ", ".join(f"'{ref.name}'" for ref in moved)
    raise UsageError(
        "FN-E115",
        f"{names} was moved to shared memory: sent to another process, or by share_memory_(). That is a copy "
        "now, and the model goes on without it. Send clones: {name: value.clone() for name, value in model.state_dict().items()}.",
    )


def _has_moved(ref: PagedParam) -> bool:
    at = (address_of(ref.frame_storage), address_of(ref.home_storage))
    return ref.numel > 0 and at != (ref.frame_address, ref.home_address)


def _renew(engine: Engine, ref: PagedParam) -> None:
    """Make a parameter's tensors anew, and bring it to the new ones."""
    p = ref.param
    at_frame, grad = ref.at_frame(), ref.grad_storage
    build_places(engine, ref)
    ref.lay_gradient(grad)  # it has not moved
    share_version(ref)
    p.data = ref.frame if at_frame else ref.home
