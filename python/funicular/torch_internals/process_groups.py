"""The store of ``torch.distributed``, and the end of a group whose ranks wait for each other.

``torch.distributed.distributed_c10d._get_default_store``: words that the processes of the default group leave for each other. In its place:
a ``TCPStore`` of one's own, for which rank 0 has to find a free port. ``_abort_process_group``: ends what NCCL waits for on the GPU. In its
place: ``ProcessGroup.abort``, which torch 2.4 does not have.

``distributed_c10d._world.pg_map``, ``ProcessGroup._get_backend``, ``_get_sequence_number_for_group``: how many collectives have been run. In their
place: nothing; torch has no observer of collectives that says more than a time-out.

``TORCH_NCCL_ASYNC_ERROR_HANDLING``: read from the environment when a group is made, and in no other way; no option of a group stands for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

__all__ = ["abort", "collectives", "default_store", "environment"]

#: arrays that another thread may still be reading
_kept: list[Any] = []


def default_store() -> Any:
    """Return the store by which the processes of the default group found each other."""
    # Looked up now: a torch that was built without distributed has no such module.
    return dist.distributed_c10d._get_default_store()


def abort(group: Any) -> None:
    """End a group of NCCL without a word to its other ranks: kernels that wait for them return.

    Raises
    ------
    ValueError
        If the program has destroyed it.
    """
    dist.distributed_c10d._abort_process_group(group)


def collectives(device: torch.device, besides: Iterable[Any]) -> int:
    """Return how many collectives between devices of this kind the process has begun in all groups but those named."""
    count = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)  # the stubs of torch leave out the method
    for group in groups:
        if not any(group is one for one in besides):
            with contextlib.suppress(RuntimeError):  # it has nothing for such devices
                count += group._get_backend(device)._get_sequence_number_for_group()
    return count


def _variables(entries: Iterable[bytes]) -> dict[bytes, bytes]:
    return {name: value for name, _, value in (entry.partition(b"=") for entry in entries)}


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Show native code of this process an environment variable, as long as the context lasts.

    ``setenv`` moves the array of variables, and threads of torch and NCCL that read it meanwhile crash. So they are shown a second array,
    which like the first one is never freed.
    """
    place = ctypes.c_void_p.in_dll(ctypes.CDLL(None), "environ")
    before = place.value
    others = [f"{k}={v}" for k, v in os.environ.items() if k != name]
    entries = [os.fsencode(entry) for entry in (*others, f"{name}={value}")]
    array = (ctypes.c_char_p * (len(entries) + 1))(*entries, None)
    _kept.append(array)
    place.value = ctypes.addressof(array)
    try:
        yield
    finally:
        if place.value == ctypes.addressof(array):
            left = _variables(itertools.takewhile(bool, array))
            place.value = before
            # What another thread has set meanwhile to another value, or taken away, it has in this array alone.
            shown = _variables(entries)
            for changed in shown.keys() | left.keys():
                if changed not in left:
                    os.unsetenv(changed)
                elif left[changed] != shown.get(changed):
                    os.putenv(changed, left[changed])
        elif name in os.environ:  # another thread has set a variable meanwhile, and so moved all of them
            os.putenv(name, os.environ[name])
        else:
            os.unsetenv(name)
