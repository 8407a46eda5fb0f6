"""Signal handlers that use the model at every point: what they do works or is refused by name, and what they struck is exact."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn

import children
import funicular
import handlers
from conftest import DEVICE, PLACEMENTS
from twin import World

#: handlers that change nothing, and handlers after which a checkpoint is loaded
CHANGING = ("clears", "steps", "trains", "loads")
EVERY = "FUNICULAR_EVERY_POINT" in os.environ
ACTIONS = ("differentiate", "step", "look", "save", "load")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs the exception table of Python 3.11")
@pytest.mark.parametrize("placement", ["host", "nvme-threads"])
@pytest.mark.parametrize("action", ACTIONS)
def test_at_every_point(action: str, placement: str, disk: str):
    strikes = [*handlers.HARMLESS, *CHANGING]
    if action == "look":
        strikes.remove("loads")  # states that are being read are not those of the optimizer any more
    if action == "load":
        strikes.remove("reads")  # states that are being replaced have no entries yet
    # One point in forty-five and one of each file, each with the next handler; ``make soak`` strikes at every one with each of them.
    body = f"import forks, handlers\nprint(handlers.struck(world, {action!r}, {strikes!r}, every={EVERY}))\nforks.end()"
    status, out, err = children.finish(
        children.start(body, disk, PLACEMENTS[placement], DEVICE), 20_000 if EVERY else children.PATIENCE
    )
    assert status == 0, f"{out}\n{err[-3000:]}"
    assert int(out) > 60, "the points were not found"


@pytest.mark.parametrize("grads", [False, True])
def test_a_model_that_comes_and_goes_within_a_backward(grads: bool, host_world: World):
    """As an evaluation in a signal handler or in a hook of a gradient does."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def other(grad: torch.Tensor) -> None:
        inner = funicular.offload(build(), host_world.policy(build()))
        with torch.set_grad_enabled(grads):
            inner(torch.ones(1, 8, device=host_world.torch_device))
        funicular.unwrap(inner)

    plain = build().to(host_world.torch_device)
    paged = funicular.offload(build(), host_world.policy(build()))
    for model in (plain, paged):
        y = model(torch.ones(1, 8, device=host_world.torch_device))
        if model is paged:
            y.register_hook(other)
        y.square().sum().backward()
    for p, q in zip(plain.parameters(), paged.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
