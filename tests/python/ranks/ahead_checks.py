"""What ranks run whose updates begin before the step: functions that return what a test looks at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crossed_checks import await_file, signalled
from rank_checks import message, offloaded, own_batch, train_one, values
from rank_scripts import DEVICE, WIDE
from torch import nn

import facts
import funicular
from funicular import _core, testing
from mutations import wrap
from twin import World


def counted(world: World, between: str) -> tuple[list[int], list[list[bool]], list[bool], list[torch.Tensor]]:
    """Train; how many updates were begun and used, or begun in vain, which had begun before each step, in which units this rank owns
    elements, and the weights.
    """
    model, opt = offloaded(world)
    begun = []
    for step in range(6):
        model(own_batch(step)).square().mean().backward()
        facts.rest(0.05)
        begun.append([unit.begun for unit in testing.inspect(model).units])
        if between == "read" and dist.get_rank() == 0:
            # It waits for no other rank, and sees the weights of the last step.
            before = [p.detach().clone() for p in model.parameters()]
            model.eval()(torch.ones(1, WIDE, device=DEVICE))
            assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
            model.train()
        elif between == "edit":
            # Refused, on one rank alone as on all.
            said = message(lambda step=step: model.out.weight.grad.mul_(0.5) if dist.get_rank() <= step % 2 else None)
            assert ("FN-E722" in said) == (dist.get_rank() <= step % 2), said
        elif between not in ("nothing", "read"):
            nn.utils.clip_grad_norm_(model.parameters(), float(between))
        opt.step()
        opt.zero_grad()
        # A unit whose last update is not made yet on all ranks begins no other one.
        testing.inspect(model).engine.settle_all()
    weights = [p.detach().clone() for p in model.parameters()]
    ahead = funicular.stats(model).ahead
    inspected, rank = testing.inspect(model), dist.get_rank()
    owns = [any(count for *_, count in _core.owned(inspected.engine, unit.number, rank)) for unit in inspected.units]
    return [ahead.used, ahead.in_vain], begun, owns, weights


def first(world: World, clip: str) -> Any:
    """Train; what the statistics say of updates ahead and of weights that came first."""
    model, opt = offloaded(world)
    for step in range(6):
        model(own_batch(step)).square().mean().backward()
        facts.rest(0.05)
        if clip != "nothing":
            nn.utils.clip_grad_norm_(model.parameters(), float(clip))
        opt.step()
        opt.zero_grad()
    return funicular.stats(model).ahead


def interrupted(world: World) -> tuple[list[str], list[torch.Tensor]]:
    """Train as :func:`counted`; in every step but the first rank 0 is interrupted at its step, calls again, and then rank 1 comes there."""
    model, opt = offloaded(world)
    said = []
    for step in range(6):
        model(own_batch(step)).square().mean().backward()
        facts.rest(0.02)
        told = Path(os.environ["RANKS_FOLDER"]) / f"interrupted {step}"
        if step and dist.get_rank():
            await_file(told)
        elif step:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("funicular._core.at_step", signalled("funicular._core.at_step"))
                try:
                    opt.step()
                except KeyboardInterrupt:
                    said.append("KeyboardInterrupt")
            told.touch()
        opt.step()
        opt.zero_grad()
    return said, [p.detach().clone() for p in model.parameters()]


def saved_and_loaded(folder: str, world: World) -> list[list[torch.Tensor]]:
    """A save beside the next step, a load between backward and step, and rank 0 alone that reads states there."""
    model, opt = offloaded(world)
    for step in range(2):
        train_one(model, opt, step)
    funicular.save(model, opt, folder, wait=False)
    found = []
    for step in range(2, 5):
        model(own_batch(step)).square().mean().backward()
        facts.rest(0.02)
        if dist.get_rank() == 0:
            opt.state_dict()
        if step == 3:
            funicular.load(folder, model, opt)
        opt.step()
        opt.zero_grad()
        found += values(model, opt)
    return found


def loaded_while_another_reads(world: World) -> None:
    """Rank 0 is at the load while rank 1 still reads the states before it; afterwards both read what was loaded."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    before = opt.state_dict()
    if dist.get_rank() == 1:
        facts.rest(0.5)
        again = opt.state_dict()
        for index, states in before["state"].items():
            assert all(torch.equal(value, again["state"][index][name]) for name, value in states.items()), index
    for states in before["state"].values():
        states["exp_avg"].mul_(0.5)
    opt.load_state_dict(before)
    after = opt.state_dict()
    for index, states in before["state"].items():
        assert torch.equal(states["exp_avg"], after["state"][index]["exp_avg"]), index


def kept_over_new_states(world: World, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """States that the program keeps, by a mapping that has read none, while others take their place; what they showed before and after."""
    model, opt = offloaded(world)
    for step in range(2):
        train_one(model, opt, step)
    params = list(model.parameters())
    kept = [opt.state[p] for p in params]
    before = [value["exp_avg"].clone() for value in opt.state_dict()["state"].values()]
    late = dist.is_initialized() and dist.get_rank() == 1

    def attaching(original: Any) -> Any:
        def attach(*args: Any) -> Any:
            if late:
                facts.rest(0.3)  # rank 0 has written
            return original(*args)

        return attach

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "funicular.optim.state_places.StatePlaces.attach", attaching)
        if kind == "loaded":
            saved = opt.state_dict()
            for states in saved["state"].values():
                states["exp_avg"].mul_(0.5)
            opt.load_state_dict(saved)
        elif kind == "loaded into another optimizer":
            folder = os.environ["RANKS_FOLDER"] + "/saved"
            funicular.save(model, opt, folder)
            train_one(model, opt, 2)
            before = [value["exp_avg"].clone() for value in opt.state_dict()["state"].values()]
            funicular.load(folder, model, funicular.AdamW(params, lr=1e-2))
        else:
            new = funicular.AdamW(params, lr=1e-2)
            train_one(model, new, 2)
    return before, [states["exp_avg"].clone() for states in kept]
