"""Parameters that other libraries take out of an offloaded model: noticed before the model is used with what they put there."""

from __future__ import annotations

import operator
import weakref
from typing import TYPE_CHECKING, Any, NoReturn

from funicular.errors import UsageError
from funicular.torch_internals.modules import own_parameters
from funicular.units.classes import is_dtensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from funicular.units.classes import Unpaged
    from funicular.windows.session import Session

__all__ = ["Held", "check_replaced", "refuse_dtensors"]


class Held:
    """The model that was offloaded, and where its modules hold the paged parameters: in columns, since every forward compares them.

    Attributes
    ----------
    model : weakref.ref
        The model.
    unpaged : list of Unpaged
        Its parameters that cannot be paged.
    """

    def __init__(self, model: nn.Module, unpaged: list[Unpaged]) -> None:
        self.model, self.unpaged = weakref.ref(model), unpaged
        self.tables: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.params: list[Any] = []
        self.names: list[str] = []

    def note(self, model: nn.Module, paged: set[int]) -> None:
        """Note where the parameters of these ids are now."""
        found = [
            (own_parameters(module), key, p, f"{prefix}.{key}" if prefix else key)
            for prefix, module in model.named_modules()
            for key, p in own_parameters(module).items()
            if id(p) in paged
        ]
        self.tables = [table for table, *_ in found]
        self.keys = [key for _, key, *_ in found]
        self.params = [p for *_, p, _ in found]
        self.names = [name for *_, name in found]


def check_replaced(session: Session) -> None:
    """Compare what modules hold with the parameters that were offloaded.

    Other ways to replace parameters stay allowed: parametrisations, ``functional_call``, adapters.

    Raises
    ------
    UsageError
        ``FN-E115`` if ``fully_shard``, ``parallelize_module`` or ``distribute_module`` have put DTensors in their place.
    """
    held: Held | None = session.held
    if held is None or all(map(operator.is_, map(dict.get, held.tables, held.keys), held.params)):
        return
    model = held.model()
    sharded = model is not None and any(_is_sharded(module) for module in model.modules())
    for table, key, p, name in zip(held.tables, held.keys, held.params, held.names, strict=True):
        now = table.get(key)
        if now is not p and now is not None and (sharded or is_dtensor(now)):
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise UsageError(
        "FN-E115",
        f"'{name}' was replaced after funicular.offload by a DTensor (fully_shard, parallelize_module, distribute_module), which the "
        "runtime cannot page. These cannot be combined with funicular, before offload or after it: make the model anew and use one.",
    )


def _is_sharded(module: nn.Module) -> bool:
    return any(c.__name__ == "FSDPModule" for c in type(module).__mro__)


def refuse_dtensors(params: Iterable[Any]) -> None:
    """Raise for parameters that are distributed over processes.

    Raises
    ------
    UsageError
        ``FN-E112``.
    """
    for p in params:
        if is_dtensor(p):
            raise UsageError(
                "FN-E112",
                f"a parameter of shape {tuple(p.shape)} is a DTensor, which funicular.AdamW has no step for. Use torch.optim.AdamW for "
                "models that fully_shard or parallelize_module has distributed.",
            )
