"""The optimizer of an offloaded model as an argument of another process."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import nn

from models import CUDA, WIDTH, Block
from twin import Run, World


def _one_step(run_model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[float]]:
    run_model(torch.ones(2, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return [p.detach().flatten().tolist() for p in run_model.parameters()]


def _step_there(model: nn.Module, optimizer: torch.optim.Optimizer, results: Any) -> None:
    results.put(_one_step(model, optimizer))


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_optimizer_as_argument_of_a_process(method: str, two_worlds: World):
    """It goes with copies of the states, over the copies of the weights, and steps them as this process steps its own."""
    if CUDA:
        pytest.skip("compares on the host")
    context: Any = multiprocessing.get_context(method)
    run = Run(two_worlds, True)
    run.model = run.wrap(nn.Sequential(*[Block() for _ in range(6)]))
    run.opt = run.adamw()
    _one_step(run.model, run.opt)
    run.opt.state[next(run.model.parameters())]["mine"] = torch.ones(3)[::2]
    results = context.SimpleQueue()
    process = context.Process(target=_step_there, args=(run.model, run.opt, results))
    process.start()
    there = results.get()
    process.join()
    assert process.exitcode == 0
    assert there == _one_step(run.model, run.opt)
