"""The store of ``torch.distributed``.

``torch.distributed.distributed_c10d._get_default_store``: words that the processes of the default group leave for each other. In its place:
a ``TCPStore`` of one's own, for which rank 0 has to find a free port.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

__all__ = ["default_store"]


def default_store() -> Any:
    """Return the store by which the processes of the default group found each other."""
    # Looked up now: a torch that was built without distributed has no such module.
    return dist.distributed_c10d._get_default_store()
