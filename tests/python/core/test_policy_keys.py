"""Keys that change how a run goes: each does what docs/policy.md says."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import funicular
from funicular import testing
from models import CUDA

DEVICE = "cuda" if CUDA else "cpu"


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])


def _train(policy: dict[str, Any], steps: int = 3) -> tuple[nn.Module, list[float]]:
    model = funicular.offload(_model().to(DEVICE), policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-2)
    x = torch.ones(4, 256, device=DEVICE)
    losses = []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        _check(model, policy)
    return model, losses


def _check(model: nn.Module, policy: dict[str, Any]) -> None:
    if policy.get("debug", {}).get("sync"):
        inside = testing.inspect(model)
        assert not any(inside.engine.update_unmade(i) for i in range(len(inside.units)))


_HOST = {"params": {"tier": "host"}, "optimizer": {"tier": "host"}, "budget": {"hbm": "32MiB"}}


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_with_debug_sync_nothing_runs_ahead(tier: str, disk: str) -> None:
    policy = {**_HOST, "optimizer": {"tier": tier}, "nvme": {"paths": [disk]}}
    free, losses = _train(policy)
    bound, same = _train({**policy, "debug": {"sync": True}})
    assert losses == same
    for a, b in zip(free.parameters(), bound.parameters(), strict=True):
        assert torch.equal(a, b)
    prefetch = funicular.stats(bound).prefetch
    assert (prefetch.late, prefetch.wasted) == (0, 0), "nothing was on its way when it was needed"


@pytest.mark.parametrize("tier", ["auto", "host", "nvme"])
def test_gradients_live_where_the_policy_says(tier: str, disk: str) -> None:
    policy = {
        **_HOST,
        "gradients": {"tier": tier},
        "nvme": {"paths": [disk]},
        "budget": {"hbm": "32MiB", "host": "64MiB"},
    }
    model, losses = _train(policy)
    assert losses == _train(_HOST)[1]
    wanted = "nvme" if tier == "nvme" else "host"
    inside = testing.inspect(model)
    assert {inside.engine.homes(i)[2] for i in range(len(inside.units))} == {wanted}
    size = sum(p.nbytes for p in model.parameters())
    used = funicular.stats(model).budgets["nvme"].used
    assert used == 0 if tier != "nvme" else size <= used < 1.1 * size


def test_under_pressure_states_are_demoted_or_refused(disk: str, caplog: pytest.LogCaptureFixture) -> None:
    # Parameters and gradients of six layers are 3.1 MiB, states as much again.
    tight = {**_HOST, "nvme": {"paths": [disk]}, "budget": {"hbm": "32MiB", "host": "4MiB"}}
    with pytest.raises(funicular.BudgetError) as caught:
        funicular.offload(_model().to(DEVICE), tight)
    assert str(caught.value).startswith("FN-E202")
    with caplog.at_level(logging.WARNING, logger="funicular"):
        model, losses = _train({**tight, "pressure": {"action": "demote"}})
    note = next(r.getMessage() for r in caplog.records if "FN-W209" in r.getMessage())
    assert "one tier lower than asked" in note
    assert "budget.host allows 4.0 MiB" in note
    host = funicular.stats(model).budgets["host"]
    assert host.limit is not None
    assert host.peak <= host.limit
    assert funicular.stats(model).budgets["nvme"].used > 0
    assert losses == _train(_HOST)[1]


def test_demotion_needs_somewhere_to_go() -> None:
    policy = {**_HOST, "budget": {"hbm": "32MiB", "host": "4MiB"}, "pressure": {"action": "demote"}}
    with pytest.raises(funicular.BudgetError, match=r"FN-E202.*nvme\.paths"):
        funicular.offload(_model().to(DEVICE), policy)


def test_patterns_of_units_are_those_of_the_policy() -> None:
    """Alternatives in braces and classes, as everywhere in a policy."""
    model = funicular.offload(_model().to(DEVICE), {**_HOST, "units": {"match": ["{0,1}", "[!01]"]}})
    assert [u.name for u in testing.inspect(model).units] == ["0", "1", "2", "3", "4", "5"]
