"""Two offloaded models in one process: what their budgets say together, in a loop of one's own and in parts of one policy."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import funicular
from funicular import _core
from funicular.integrations.policies import divided, refuse_twice
from models import Stack
from twin import World


def offloaded_with(policies: list[object], caplog: pytest.LogCaptureFixture) -> tuple[list[nn.Module], list[str]]:
    """Offload a model with each, and return the models and what was said of their budgets."""
    models: list[nn.Module] = [Stack() for _ in policies]
    with caplog.at_level(logging.WARNING, "funicular"):
        for model, policy in zip(models, policies, strict=True):
            funicular.offload(model, policy)  # type: ignore[arg-type]
    return models, [text for record in caplog.records if (text := record.getMessage()).startswith("FN-W212")]


# Sizes that no other test has: a model that one of them has left counts, as long as it is there.
def test_the_same_policy_for_two_is_told(host_world: World, caplog: pytest.LogCaptureFixture):
    policy = host_world.policy(Stack(), budget={"host": "66MiB"})
    sizes = policy["budget"]
    models, said = offloaded_with([policy, policy], caplog)
    assert len(said) == 1
    assert "another model of this process (Stack)" in said[0]
    assert f"budget.host = {sizes['host']}" in said[0]
    assert "divided(policy, model, other)" in said[0]
    # It is said and no more: both train.
    opt = funicular.AdamW([p for model in models for p in model.parameters()], lr=1e-2)
    sum(model(torch.randn(2, models[0].width)).square().mean() for model in models).backward()  # type: ignore[union-attr]
    opt.step()


def test_what_is_not_twice_is_not_told(host_world: World, caplog: pytest.LogCaptureFixture):
    policy = host_world.policy(Stack(), budget={"host": "68MiB"})
    other = {**policy, "budget": {**policy["budget"], "host": "65MiB"}}
    open_ = {"device": policy["device"]}
    models, said = offloaded_with([policy, other, open_, open_], caplog)
    assert not said
    funicular.unwrap(models[0])
    _, said = offloaded_with([policy], caplog)
    assert not said, "the first one has given its memory back"


def test_parts_of_one_policy_are_not_told(host_world: World, caplog: pytest.LogCaptureFixture):
    """Also those of equal models: no other trainer's model takes them for the same policy."""
    policy = host_world.policy(Stack(), frames=9)
    parts = divided(policy, Stack(), Stack(), Stack())
    models, said = offloaded_with(list(parts), caplog)
    assert not said
    limits = [funicular.stats(model).budgets["host"].limit or 0 for model in models]
    whole = _core.size_in_bytes(policy["budget"]["host"])
    assert whole - 8 < sum(limits) <= whole
    refuse_twice(parts[1], models[:1])


def test_one_size_in_common_is_refused_under_a_trainer(host_world: World):
    """Memory of the device alone, too: the other sizes are open."""
    policy = funicular.Policy.load({"device": host_world.device, "budget": {"hbm": "4MiB"}})
    model = funicular.offload(Stack(), policy)
    with pytest.raises(funicular.UsageError, match=r"FN-E141 .*Stack.*budget\.hbm = 4MiB twice"):
        refuse_twice(policy, [model])
    refuse_twice(policy.replace(budget__hbm="5MiB"), [model])


def test_sizes_are_read_as_the_policy_reads_them():
    """To the byte, in units of 1000 and of 1024."""
    assert _core.size_in_bytes("500kB") == 500_000
    assert _core.size_in_bytes(" 1.5 GiB ") == 3 << 29
    (part,) = divided({"budget": {"nvme": "9007199254740993B"}}, Stack())
    assert _core.size_in_bytes(part.budget.nvme) == 9_007_199_254_740_993  # one more than a float holds
    with pytest.raises(funicular.UsageError, match=r"FN-E503.*did you mean \"4GiB\""):
        _core.size_in_bytes("4")


def test_nothing_to_divide():
    """Open budgets stay open, for equal models and for those without parameters."""
    parts = divided(None, nn.ReLU(), nn.ReLU())
    assert [part.budget for part in parts] == [funicular.Policy.load(None).budget] * 2
    none = divided({"budget": {"nvme": "0B"}}, Stack(), Stack())
    assert [part.budget.nvme for part in none] == ["0B", "0B"]
