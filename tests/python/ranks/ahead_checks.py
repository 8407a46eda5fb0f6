"""What ranks run whose updates begin before the step: functions that return what a test looks at."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rank_checks import offloaded, own_batch
from rank_scripts import WIDE
from torch import nn

import facts
import funicular
from funicular import testing
from twin import World


def counted(world: World, between: str) -> tuple[list[int], list[list[bool]], list[torch.Tensor]]:
    """Train; how many updates were begun and used, or begun in vain, which had begun before each step, and the weights."""
    model, opt = offloaded(world)
    begun = []
    for step in range(6):
        model(own_batch(step)).square().mean().backward()
        facts.rest(0.05)
        begun.append([unit.begun for unit in testing.inspect(model).units])
        if between == "read" and dist.get_rank() == 0:
            # It waits for no other rank, and sees the weights of the last step.
            before = [p.detach().clone() for p in model.parameters()]
            model.eval()(torch.ones(1, WIDE))
            assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
            model.train()
        elif between != "nothing" and between != "read":
            nn.utils.clip_grad_norm_(model.parameters(), float(between))
        opt.step()
        opt.zero_grad()
    weights = [p.detach().clone() for p in model.parameters()]
    ahead = funicular.stats(model).ahead
    assert ahead.weights_first == 0
    return [ahead.used, ahead.in_vain], begun, weights
