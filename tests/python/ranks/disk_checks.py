"""What ranks run whose states live on NVMe: functions that return what a test looks at."""

from __future__ import annotations

from rank_checks import offloaded, train_one

import funicular
from twin import World


def placed(world: World) -> list[int]:
    """Bytes on NVMe, and of all states."""
    model, _ = offloaded(world)
    return [funicular.stats(model).budgets["nvme"].used, 8 * sum(p.numel() for p in model.parameters())]


def traffic(world: World, steps: int) -> dict[str, int]:
    """Bytes that this rank has read and written on NVMe, and those of all states."""
    model, opt = offloaded(world)
    for step in range(steps):
        train_one(model, opt, step)
    sum(float(opt.state[p]["exp_avg"].sum()) for p in model.parameters())  # all is written
    figures = funicular.stats(model)
    states = 8 * sum(p.numel() for p in model.parameters())
    return {"states": states, "read": figures.links["nvme_read"].bytes, "written": figures.links["nvme_write"].bytes}


def trained_until(world: World, steps: int) -> list[str]:
    """Train until an error; its code, and what it says."""
    try:
        model, opt = offloaded(world)
        for step in range(steps):
            train_one(model, opt, step)
            model.out.weight.detach().sum().item()
    except funicular.Error as error:
        return [error.code, str(error)]
    return ["", ""]
