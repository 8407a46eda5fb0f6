"""What ranks run whose states move up into free memory of the device: scripts of comparisons, and functions that return what a test looks at.

The host device has no memory of its own: each rank makes up how much there is. On a GPU what is free is taken as it is.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from crossed_checks import await_file
from rank_checks import message, own_batch, values
from rank_scripts import WIDE, alone, loss, wide
from torch import nn

import facts
import funicular
from funicular import testing
from models import CUDA
from several import Ranked
from twin import SEED, World

CAPACITY = 64 << 20
#: others leave the margin and room for all states, for some, or less than the margin
ROOMY, TIGHT, SHORT = 1 << 20, CAPACITY - (CAPACITY // 4) - (1400 << 10), CAPACITY - (64 << 10)
#: steps until all have moved up
RISEN = 5


def others(model: nn.Module, size: int) -> None:
    """Let the program and others have so much of the device's memory."""
    if not CUDA:
        testing.inspect(model).make_memory_up(CAPACITY, size)


def taken(model: nn.Module) -> int:
    """Bytes of states that are up."""
    return funicular.stats(model).grown.taken


def wrapped(run: Ranked, dtype: torch.dtype, where: str = "auto") -> None:
    """Offload a model of ``run`` with room for all states."""
    run.model = run.wrap(wide(dtype), budget={"hbm": None}, optimizer={"where": where})
    run.opt = run.adamw()
    if run.offloaded:
        others(run.model, ROOMY)


def risen(run: Ranked) -> None:
    """On a rank: wait until states are up."""
    if run.offloaded:
        facts.eventually(lambda: taken(run.model) > 0)


def training(
    run: Ranked,
    steps: int = 14,
    accumulate: int = 1,
    clip: float = 0.0,
    dtype: torch.dtype = torch.float32,
    weather: bool = True,
    where: str = "auto",
) -> None:
    """Steps while memory comes and goes, on each rank at another time; states are looked at by one rank, and by all."""
    wrapped(run, dtype, where)
    for step in range(steps):
        if run.offloaded and weather:
            own = step + (run.rank or 0)
            others(run.model, SHORT if own % 7 == 6 else TIGHT if own % 5 == 4 else ROOMY)
        for _ in range(accumulate):
            run.backward(lambda rank: loss(run, rank, dtype))
        if clip:
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), clip if step % 3 else 1e9))
        if step == RISEN and not weather:
            risen(run)
        if run.offloaded and step % 6 == 5 and run.rank == step % 2:
            testing.inspect(run.model).give_memory_back()
        run.opt.step()
        run.opt.zero_grad()
        if step % 4 == 3:
            read_states(run, run.rank in (None, 0))
    if run.offloaded:
        grown = funicular.stats(run.model).grown
        assert grown.up > 0, "nothing moved up"
        assert not weather or grown.down > 0 or CUDA, "nothing moved down"


def read_states(run: Ranked, here: bool) -> None:
    """Note the states on rank 0 alone, which waits for no other thread of the others than their own."""
    for name, p in run.model.named_parameters():
        run.alone(f"{name}.exp_avg_sq", run.opt.state[p]["exp_avg_sq"] if here else None)


def using(run: Ranked, dtype: torch.dtype = torch.float32, clip: float = 0.0, where: str = "auto") -> None:
    """Once states are up: rank 0 alone evaluates and reads, states are loaded and edited, ranks skip backwards, and what is up follows."""
    wrapped(run, dtype, where)
    x = torch.ones(2, WIDE, device=run.device, dtype=dtype)
    for step in range(RISEN + 6):
        run.backward(lambda rank: loss(run, rank, dtype), [0] if step == RISEN + 1 and not clip else None)
        if clip:
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), clip))
        if step == RISEN:
            risen(run)
        if step >= RISEN:
            alone(run, x)
        if step in (RISEN + 2, RISEN + 4):
            saved = run.opt.state_dict()
            for states in saved["state"].values():
                states["exp_avg"].mul_(0.5)
            run.opt.load_state_dict(saved)
        run.step()
        read_states(run, run.rank in (None, 0) and step != RISEN + 3)


def offloaded(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose states may move up, and its optimizer."""
    torch.manual_seed(SEED)
    model = wide()
    funicular.offload(model, world.policy(model, budget={"hbm": None}))
    others(model, ROOMY)
    return model, funicular.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    """Steps on two batches, dealt to one or two ranks; a third rank has none."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for step in steps:
        for batch in range(2):
            if size == 1 or batch % size == rank:
                (model(own_batch(step, batch)).square().mean() / (2 / size)).backward()
        opt.step()
        opt.zero_grad()


def up(model: nn.Module) -> int:
    """Wait until states are up; how many bytes of them."""
    facts.eventually(lambda: taken(model) > 0)
    return taken(model)


def fixed(world: World) -> list[int]:
    """What moves up where ``budget.hbm`` is said."""
    model = wide()
    funicular.offload(model, world.policy(model))
    opt = funicular.AdamW(model.parameters(), lr=1e-2)
    others(model, ROOMY)
    train(model, opt, range(8))
    return [funicular.stats(model).grown.up]


def shares(world: World) -> list[int]:
    """What a rank's states take once all are up, what all ranks' states are, the units that moved, and the peak beside what others have."""
    model, opt = offloaded(world)
    train(model, opt, range(RISEN))
    units = len(testing.inspect(model).units)
    facts.eventually(lambda: len({move.unit for move in funicular.stats(model).grown.moves}) == units)
    states = sum(2 * p.numel() * 4 for p in model.parameters())
    grown = funicular.stats(model).grown
    return [grown.taken, states, ROOMY + grown.peak + grown.margin]


def saved_by_one(folder: str, world: World) -> list[list[torch.Tensor]]:
    """Rank 0 alone saves while the others wait at their step, with states up on all; then all train on."""
    model, opt = offloaded(world)
    train(model, opt, range(RISEN))
    up(model)
    if dist.get_rank() == 0:
        facts.rest(0.2)
        funicular.save(model, opt, folder)
    train(model, opt, range(RISEN, RISEN + 2))
    return values(model, opt)


def resumed(folder: str, world: World) -> list[list[list[torch.Tensor]]]:
    """Train to where states are up, load, and train on; what is there after each."""
    model, opt = offloaded(world)
    train(model, opt, range(20, 20 + RISEN))
    up(model)
    funicular.load(folder, model, opt)
    loaded = values(model, opt)
    train(model, opt, range(RISEN, RISEN + 2))
    return [loaded, values(model, opt)]


def leaving(world: World) -> list[list[torch.Tensor]]:
    """Unwrap while states are up; what each rank has then."""
    model, opt = offloaded(world)
    train(model, opt, range(RISEN))
    up(model)
    funicular.unwrap(model)
    return values(model, opt)


def closing(world: World) -> list[list[torch.Tensor]]:
    """Rank 1 ends its model while rank 0 waits to read the states."""
    model, opt = offloaded(world)
    train(model, opt, range(RISEN))
    up(model)
    told = Path(os.environ["RANKS_FOLDER"]) / "closed"
    if dist.get_rank():
        testing.inspect(model).engine.close()
        told.touch()
        return []
    await_file(told)
    return values(model, opt)


def owner_killed(world: World, victim: int) -> list[str]:
    """A rank is killed whose states are up; what the others are told that read them."""
    model, opt = offloaded(world)
    train(model, opt, range(RISEN))
    up(model)
    if dist.get_rank() == victim:
        os.kill(os.getpid(), 9)

    def read() -> None:
        while True:
            values(model, opt)

    said = message(read)
    return [said[:7], said]
