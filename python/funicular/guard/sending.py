"""Tensors as arguments of a process that is being spawned: their bytes go with the arguments.

torch sends a file descriptor of shared memory in their place, which must stay open until the process runs. Copies of offloaded
weights are gone by then.
"""

from __future__ import annotations

import ctypes
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import nn

__all__ = ["ByValue", "packed", "spawning"]


def spawning() -> bool:
    """Whether this thread is pickling the arguments of a new process."""
    return get_spawning_popen() is not None


def packed(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a dense tensor as pickle takes it, by value."""
    with torch.no_grad():
        flat = torch.as_strided(tensor.detach(), (tensor.numel(),), (1,)).view(torch.uint8).cpu()
    raw = ctypes.string_at(flat.data_ptr(), flat.numel()) if flat.numel() > 0 else b""
    kind = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor
    place = (tensor.dtype, str(tensor.device), tuple(tensor.size()), tensor.stride())
    return _unpacked, (kind, raw, place, tensor.requires_grad, dict(tensor.__dict__))


class ByValue:
    """Becomes a dense tensor of its own where it is unpickled."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return packed(self.tensor)


def _unpacked(
    kind: type[torch.Tensor],
    raw: bytes,
    place: tuple[torch.dtype, str, tuple[int, ...], tuple[int, ...]],
    requires_grad: bool,
    attributes: dict[str, Any],
) -> torch.Tensor:
    dtype, device, size, stride = place
    if raw:
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone().view(dtype)
    else:
        flat = torch.empty(0, dtype=dtype, device="cpu")
    tensor = torch.as_strided(flat, size, stride).to(device)
    tensor = nn.Parameter(tensor, requires_grad) if kind is nn.Parameter else tensor.requires_grad_(requires_grad)
    tensor.__dict__.update(attributes)
    return tensor
