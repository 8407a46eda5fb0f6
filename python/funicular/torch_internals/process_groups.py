"""The store of ``torch.distributed``, and the end of a group whose ranks wait for each other.

``torch.distributed.distributed_c10d._get_default_store``: words that the processes of the default group leave for each other. In its place:
a ``TCPStore`` of one's own, for which rank 0 has to find a free port. ``_abort_process_group``: ends what NCCL waits for on the GPU. In its
place: ``ProcessGroup.abort``, which torch 2.4 does not have.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["abort", "default_store"]


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
