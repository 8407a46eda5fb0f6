"""Digests of bytes that other code may edit without a trace: homes and frames that other tensors look at.

A version counter shows what torch's own operations do to a weight. Edits through numpy, a raw address, ``.data`` or a kernel
that forgets to count show only in the bytes. Nothing is digested while only the runtime's own tensors look.
"""

from __future__ import annotations

import functools
import random
from array import array
from typing import TYPE_CHECKING, Any

import torch

from funicular import _core

if TYPE_CHECKING:
    from collections.abc import Iterable

    from funicular.units.param import PagedParam
    from funicular.units.unit import Unit

__all__ = ["changed_at_home", "changed_in_frames", "digest", "look_at_frames", "look_at_home", "renew_home"]

_T: Any = torch.Tensor
#: elements digested at a time on a device
_PIECE = 1 << 20
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: torch.Tensor) -> int:
    """Return a number that tells a dense tensor's bytes from any other bytes; work enqueued on it so far is included."""
    if tensor.device.type == "cpu":
        return _core.digest(_T.data_ptr(tensor), tensor.numel() * tensor.element_size())
    return _device_digest(tensor)


def _device_digest(tensor: torch.Tensor) -> int:
    """Sum of all words, each times a random odd number, modulo 2**64."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = torch.as_strided(tensor, (tensor.numel(),), (1,)).view(_WORDS[tensor.element_size()])
    factors = _factors(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in torch.split(flat, _PIECE):
        total = total * 0x5851F42D4C957F2D + (piece.to(torch.int64) * factors[: piece.numel()]).sum()
    return int(total)


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> torch.Tensor:
    # Not by torch's random numbers, which torch.func.vmap refuses.
    drawn = array("q", random.Random(0x46756E69).randbytes(8 * _PIECE))
    return (torch.frombuffer(drawn, dtype=torch.int64) | 1).to(device)


def _home_digest(ref: PagedParam) -> int:
    return _core.digest(ref.home_address, ref.numel * ref.home.element_size())


def _synchronise(unit: Unit) -> None:
    """On a device: the host is about to read what kernels may still be writing."""
    device = unit.params[0].home.device
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()


def _homes(unit: Unit) -> list[int]:
    _synchronise(unit)
    return [_home_digest(ref) for ref in unit.params]


def look_at_home(unit: Unit) -> None:
    """Remember a home's bytes, unless they are remembered. It must be readable and current."""
    if unit.home_seen is None:
        unit.see_home(_homes(unit))


def renew_home(unit: Unit, refs: Iterable[PagedParam]) -> None:
    """Remember anew what the homes of some parameters are: their edits are known."""
    digests = unit.home_seen
    if digests is not None:
        _synchronise(unit)
        for ref in refs:
            digests[unit.params.index(ref)] = _home_digest(ref)


def changed_at_home(unit: Unit) -> list[PagedParam]:
    """Return the parameters whose homes are not what they were when last seen."""
    if unit.home_seen is None:
        return []
    return [ref for ref, a, b in zip(unit.params, unit.home_seen, _homes(unit), strict=True) if a != b]


def look_at_frames(unit: Unit) -> None:
    """Remember the frames' bytes: a view of them is kept alive, and the home has the same."""
    unit.see_frames([digest(ref.frame) for ref in unit.params])


def changed_in_frames(unit: Unit) -> list[PagedParam]:
    """Return the parameters that were edited through views of their frames since last seen."""
    if unit.frames_seen is None:
        return []
    return [ref for ref, seen in zip(unit.params, unit.frames_seen, strict=True) if digest(ref.frame) != seen]
