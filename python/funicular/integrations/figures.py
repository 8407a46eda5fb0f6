"""Figures of a run for the loggers of a training framework."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from funicular.report.step_time import PEERS
from funicular.statistics import stats
from funicular.windows.lookup import session_for

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Figures"]

#: dense bf16 operations per second, by what the device's name begins with
_PEAKS = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA GH200": 989e12, "NVIDIA A100": 312e12, "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 5090": 210e12,
}  # fmt: skip


class Figures:
    """Counts tokens of training forwards, and says what happened since it was asked last.

    Parameters
    ----------
    model : nn.Module
        The model that the loop calls.
    peak_flops : float or None
        Operations per second of the device at best, for the share of them that is used (MFU); known for some GPUs.
    """

    def __init__(self, model: nn.Module, peak_flops: float | None = None) -> None:
        self._model = model
        self._peak = peak_flops
        self._tokens = 0
        self._per_token = _operations_per_token(model)
        self._began = time.monotonic()
        self._stalls: dict[str, float] = {}
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def close(self) -> None:
        """Count no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self.count([*args, *kwargs.values()])

    def count(self, batch: Any) -> None:
        """Count the tokens of a batch that does not come through the model's own call."""
        self._tokens += _tokens_of(batch if isinstance(batch, (list, tuple)) else [batch])

    def take(self) -> dict[str, float]:
        """Return what happened since the last call, by names that begin with ``funicular/``; nothing if the model is not offloaded."""
        if session_for(self._model) is None:
            return {}
        now, said = time.monotonic(), stats(self._model)
        seconds = max(now - self._began, 1e-9)
        stalls = {cause: waited - self._stalls.get(cause, 0.0) for cause, waited in said.stalls.items()}
        figures = {"funicular/stalled": sum(stalls.values()) / seconds}
        if said.ranks is not None:
            figures["funicular/exchange"] = stalls["exchange"] / seconds
            figures["funicular/peers"] = sum(stalls[cause] for cause in PEERS) / seconds
        if self._tokens:
            rate = self._tokens / seconds
            figures["funicular/tokens_per_second"] = rate
            peak = self._peak or _peak_of(said.device)
            if peak:
                figures["funicular/mfu"] = rate * self._per_token / peak
        figures |= {f"funicular/{tier}_gib": budget.used / 2**30 for tier, budget in said.budgets.items()}
        self._began, self._stalls, self._tokens = now, said.stalls, 0
        return figures


def _tokens_of(values: Any) -> int:
    """Return the elements of the first tensor of whole numbers: the tokens' ids."""
    for value in values:
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.ndim >= 1:
            return value.numel()
        if isinstance(value, Mapping):
            found = _tokens_of(value.values())
            if found:
                return found
    return 0


def _operations_per_token(model: nn.Module) -> float:
    """Return what forward and backward compute per token with the weights: 6 for each that is trained, 4 for each that is frozen."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    total = 0.0
    for p in model.parameters():
        if p.ndim >= 2 and (id(p) not in looked_up or id(p) in multiplied):
            total += (6 if p.requires_grad else 4) * p.numel()
    return total


def _peak_of(device: str) -> float | None:
    if not device.startswith("cuda"):
        return None
    name = torch.cuda.get_device_name(torch.device(device))
    return next((peak for begin, peak in _PEAKS.items() if name.startswith(begin)), None)
