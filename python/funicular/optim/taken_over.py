"""States whose place in the runtime others are about to take.

Where several ranks share it, rank 0 writes for all of them. So each rank first looks at what the program still has of the states before, and ends
updates that read them; then they wait for each other, and none writes before.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from funicular.units.param import ref_of
from funicular.windows.lookup import owner_of
from funicular.windows.ranked import all_together, join_ranks
from funicular.windows.shutdown import living

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from funicular.windows.session import Session

__all__ = ["give_way", "join", "replacing"]


def join(optimizer: torch.optim.Optimizer) -> list[Session]:
    """Before a step: wait until all ranks that train these parameters are at theirs. Returns what they train with others."""
    if all(session.group is None for session in living):
        return []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    _give_way(optimizer, params, loads=False)
    return join_ranks(params)


@contextlib.contextmanager
def replacing(optimizer: torch.optim.Optimizer, params: Iterable[torch.Tensor], what: str) -> Iterator[None]:
    """Have all ranks replace the states of these parameters; ``what`` they have done then, for messages."""
    params = list(params)
    _give_way(optimizer, params, loads=True)
    with all_together(params, what):
        yield


def give_way(optimizer: Any) -> None:
    """Before a checkpoint is loaded into an optimizer: keep what others have in its states' places, which are filled before anything is attached."""
    if hasattr(optimizer, "_states"):
        _give_way(optimizer, [p for group in optimizer.param_groups for p in group["params"]], loads=False, alone=True)


def _give_way(optimizer: Any, params: Iterable[torch.Tensor], *, loads: bool, alone: bool = False) -> None:
    for p in params:
        ref = ref_of(p)
        if ref is None or not ref.trainable or ref.states is None or (owner_of(ref.unit).group is None and not alone):
            continue
        own = optimizer.state.get(p) is ref.states
        if own and not loads:
            continue
        ref.unit.owner.engine.drop_speculation(ref.unit.engine_id)
        before = ref.states
        # The attribute, this variable, the argument of getrefcount, and the optimizer, which lets go of its own.
        if sys.getrefcount(before) > 3 + own:
            before.detach()
