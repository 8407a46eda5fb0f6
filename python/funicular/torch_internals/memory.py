"""Memory of tensors: which storage, where it begins, and how many look at it.

``UntypedStorage._cdata`` is a number for a storage, and ``torch._C._storage_Use_Count`` says how many tensors and handles share it.
``Tensor._use_count`` says how many hold a tensor in C++. In their place: nothing. A window would keep its frames until its model is gone, and
every gradient would count as kept.

``torch._C.StorageBase.data_ptr``: in its place ``UntypedStorage.data_ptr``.

``Tensor._make_subclass``: a tensor of a class over another one's memory. In its place: ``as_subclass``, and the flag set afterwards.

``torch._C._swap_tensor_impl``: in its place ``torch.utils.swap_tensors``, which exchanges classes and attributes too.

``torch._C._cuda_getCurrentRawStream``: in its place ``torch.cuda.current_stream(device).cuda_stream``, which costs more per call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from funicular.torch_internals.overrides import unguarded

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "address_of",
    "dense_bytes",
    "make_subclass",
    "number_of",
    "same_storage",
    "storage_address",
    "storage_uses",
    "stream_of",
    "swap",
    "tensor_uses",
    "uses_of",
]

_T: Any = torch.Tensor
_Storage: Any = torch._C.StorageBase

#: how many tensors and handles share a storage, by its number
uses_of: Callable[[int], int] = torch._C._storage_Use_Count
#: where a storage begins
address_of: Callable[[torch.UntypedStorage], int] = _Storage.data_ptr
#: how many hold a tensor in C++
tensor_uses: Callable[[torch.Tensor], int] = _T._use_count
#: a tensor of a class, over another tensor's memory: class, tensor, whether it needs a gradient
make_subclass: Any = _T._make_subclass


def dense_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values as bytes, in the order of its elements: a view if they lie so."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def number_of(storage: torch.UntypedStorage) -> int:
    """Return the number of a storage."""
    return int(storage._cdata)


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and handles share a storage."""
    return int(uses_of(storage._cdata))


def storage_address(tensor: torch.Tensor) -> int:
    """Where a tensor's storage begins. Not by a method of the tensor: parameters in windows take note of such questions."""
    with unguarded():
        return int(torch.Tensor.untyped_storage(tensor).data_ptr())


def same_storage(tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
    """Whether a tensor lies in a storage; the caller has switched guards off."""
    return bool(torch.Tensor.untyped_storage(tensor)._cdata == storage._cdata)


def stream_of(device: torch.device) -> int:
    """Raw handle of the stream that the calling thread computes on; 0 on the host."""
    if device.type != "cuda":
        return 0
    # Not `torch.cuda.current_stream`: dynamo puts its own stream objects there.
    return int(torch._C._cuda_getCurrentRawStream(device.index))


def swap(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Exchange what two tensors are while the objects stay; False if something of torch's own holds one of them."""
    try:
        torch._C._swap_tensor_impl(tensor, other)
    except RuntimeError:
        return False
    return True
