"""Train models larger than the GPU's memory, and larger than host memory, in an ordinary PyTorch loop."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from funicular._core import __version__
from funicular.errors import BudgetError, Error, RuntimeFailure, StorageError, UsageError

if TYPE_CHECKING:
    from funicular.checkpoint.save_load import Loaded, SaveHandle, load, save
    from funicular.offloading import offload, unwrap
    from funicular.optim.adamw import AdamW
    from funicular.policy import Policy
    from funicular.report.step_time import StepTime
    from funicular.statistics import Stats, stats

__all__ = [
    "AdamW",
    "BudgetError",
    "Error",
    "Loaded",
    "Policy",
    "RuntimeFailure",
    "SaveHandle",
    "Stats",
    "StepTime",
    "StorageError",
    "UsageError",
    "__version__",
    "load",
    "offload",
    "save",
    "stats",
    "unwrap",
]

#: Where the names are that are imported when they are first asked for. All but the policy need torch, which takes seconds and
#: hundreds of megabytes; the command line and programs that only read policies do without.
_LATER = {
    "AdamW": "funicular.optim.adamw",
    "Loaded": "funicular.checkpoint.save_load",
    "Policy": "funicular.policy",
    "SaveHandle": "funicular.checkpoint.save_load",
    "Stats": "funicular.statistics",
    "StepTime": "funicular.report.step_time",
    "load": "funicular.checkpoint.save_load",
    "offload": "funicular.offloading",
    "save": "funicular.checkpoint.save_load",
    "stats": "funicular.statistics",
    "unwrap": "funicular.offloading",
}


if not TYPE_CHECKING:  # checkers of types know the names by their imports, and no others

    def __getattr__(name: str) -> Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_LATER[name]), name)
        if name != "Policy":
            # All at once: a signal handler that saves may strike amid an import, and would find a module that is not whole.
            for module in dict.fromkeys(_LATER.values()):
                import_module(module)
            import_module("funicular.install").install()
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
