"""Reads of NVMe-resident weights outside their windows stay within the host budget."""

from __future__ import annotations

import pytest
import torch

import funicular
from conftest import DEVICE


def test_holding_more_than_the_budget_is_refused(disk: str):
    """One weight after the other can be read; all at once are more host memory than is allowed."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(256, 256)) for _ in range(16)])
    before = [p.detach().clone() for p in model.parameters()]
    policy = {
        "device": DEVICE,
        "budget": {"hbm": "64MiB", "host": "7MiB", "nvme": "64MiB"},
        "nvme": {"paths": [disk]},
        "params": {"tier": "nvme"},
        "optimizer": {"tier": "nvme"},
    }
    funicular.offload(model, policy)
    assert all(torch.equal(p.cpu(), b) for p, b in zip(model.parameters(), before))
    with pytest.raises(funicular.BudgetError, match="FN-E205") as caught:
        _ = [p.detach() for p in model.parameters()]
    assert "budget.host" in str(caught.value)
    budget = funicular.stats(model).budgets["host"]
    assert budget.limit is not None
    assert budget.peak <= budget.limit
    del caught
    model(torch.ones(2, 256).to(DEVICE.replace("host", "cpu"))).sum().backward()
