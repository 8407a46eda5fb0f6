"""FSDP, which asks before it takes hold of a model, whenever it is imported.

The modules in which ``FullyShardedDataParallel`` and ``fully_shard`` are defined, by torch's version, and of the decorator around the latter the
variable ``state_cls``: it is called before anything is touched. Who has imported ``fully_shard`` already has that very function. In their
place: the errors of a model that has been sharded, when it is used. To import FSDP here would cost every program a second.
"""

from __future__ import annotations

import functools
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["watch_sharding"]

_CLASS, _FUNCTION = "FullyShardedDataParallel", "fully_shard"
_ROOMS = {
    "torch.distributed.fsdp.fully_sharded_data_parallel": _CLASS,
    "torch.distributed.fsdp._fully_shard._fully_shard": _FUNCTION,
    "torch.distributed._composable.fsdp.fully_shard": _FUNCTION,  # until torch 2.5
}


def watch_sharding(refuse: Callable[[str, Any], None]) -> None:
    """Have ``refuse`` called with the name and the module, or modules, that FSDP is about to take; what it raises goes to the caller."""
    for name, kind in _ROOMS.items():
        if name in sys.modules:
            _watch(sys.modules[name], kind, refuse)
    sys.meta_path.insert(0, _Finder(refuse))


def _watch(room: ModuleType, kind: str, refuse: Callable[[str, Any], None]) -> None:
    found = vars(room).get(kind)
    if found is not None:
        (_watch_class if kind == _CLASS else _watch_function)(found, refuse)


def _watch_class(cls: Any, refuse: Callable[[str, Any], None]) -> None:
    begin = cls.__init__

    def asking(self: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        refuse(_CLASS, module)
        begin(self, module, *args, **kwargs)

    functools.update_wrapper(asking, begin)
    cls.__init__ = asking


def _watch_function(function: Any, refuse: Callable[[str, Any], None]) -> None:
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cell = cells.get("state_cls")
    if cell is None or hasattr(cell.cell_contents, "asks"):
        return  # another torch, or it is watched already, in another room
    make = cell.cell_contents

    def asking() -> Any:
        refuse(_FUNCTION, sys._getframe(1).f_locals["module"])
        return make()

    asking.asks = True  # type: ignore[attr-defined]
    cell.cell_contents = asking


class _Finder(importlib.abc.MetaPathFinder):
    """Finds no module itself; those that matter are watched once they have been loaded."""

    def __init__(self, refuse: Callable[[str, Any], None]) -> None:
        self._refuse = refuse

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        kind = _ROOMS.get(fullname)
        if kind is None:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Finder) else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._have_watched(spec.loader, kind)
                return spec
        return None

    def _have_watched(self, loader: Any, kind: str) -> None:
        load = loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            _watch(module, kind, self._refuse)

        loader.exec_module = loaded
