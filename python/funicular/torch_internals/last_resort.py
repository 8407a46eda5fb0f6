"""What torch's allocator does before it raises an out-of-memory error: it frees the unused blocks of its pools, and tries again.

A pool of our own (``torch.cuda.MemPool`` over functions of the core) whose maker is gone, with one unused block, is among them.
Its block is no memory: freeing it has states moved down that lie in memory which was free. In its place, before torch 2.9 (whose pools
may free a block by another function) and where torch calls neither function: nothing moves up.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from funicular import _core

__all__ = ["arm", "works"]

#: torch's older pools have no reference to it
_kept: list[Any] = []
#: whether it worked when it was tried, by device
_tried: dict[torch.device, bool] = {}


def works(device: torch.device) -> bool:
    """Whether torch calls the core when it gives back what it can. It is tried once, which empties torch's cache of unused memory."""
    if device not in _tried:
        _tried[device] = _try(device)
    return _tried[device]


def _try(device: torch.device) -> bool:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
        return False
    before = _core.blocks_given_back()
    try:
        if not arm(device):
            return False
        torch.cuda.empty_cache()
    except (RuntimeError, AttributeError, OSError) as error:
        warnings.warn(f"torch's allocator cannot be asked to give memory back: {error}", stacklevel=2)
        return False
    return _core.blocks_given_back() > before


def arm(device: torch.device) -> bool:
    """Leave a block in a pool that torch frees when it finds no memory; it is gone then, and may be left again."""
    memory: Any = torch.cuda.memory
    if not _kept:
        _kept.append(memory.CUDAPluggableAllocator(_core.__file__, "funicular_stand_in", "funicular_give_back"))
    with torch.cuda.device(device):
        pool = torch.cuda.MemPool(_kept[0].allocator())
        with torch.cuda.use_mem_pool(pool):
            # Not a tensor: torch writes into new ones where algorithms are to be deterministic.
            block = memory.caching_allocator_alloc(1, device)
        # In this order: a pool in use is not freed, and one without blocks is forgotten at once.
        del pool
        memory.caching_allocator_delete(block)
    return True
