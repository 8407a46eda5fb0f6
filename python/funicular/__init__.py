"""Train models larger than the GPU's memory, and larger than host memory, in an ordinary PyTorch loop."""

from __future__ import annotations

from funicular._core import __version__
from funicular.checkpoint.save_load import Loaded, SaveHandle, load, save
from funicular.errors import BudgetError, Error, RuntimeFailure, StorageError, UsageError
from funicular.install import install as _install
from funicular.offloading import offload, unwrap
from funicular.optim.adamw import AdamW
from funicular.policy import Policy
from funicular.stats import Stats, StepTime, stats

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

_install()
