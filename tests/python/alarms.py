"""Signals that come again and again, faster than the package can note what it did."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

import funicular
from interrupts import agree, count, twins
from models import WIDTH
from twin import SEED, World


class Step:
    """A step amid alarms; called again, it waits until the last one has come."""

    def __init__(self, step: Callable[[], Any], chance: random.Random, usual: float) -> None:
        self.step: Callable[[], Any] | None = step
        self.left = chance.randint(2, 5)
        self.after, self.gap = usual * chance.uniform(0.05, 1.5), chance.uniform(1e-4, 6e-4)
        signal.signal(signal.SIGALRM, self.fire)

    def fire(self, *_: Any) -> None:
        if self.left == 0:
            return  # on a busy machine one more is on its way when the last one stops the timer
        self.left -= 1
        if self.left == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
        raise KeyboardInterrupt

    def __call__(self) -> None:
        step, self.step = self.step, None
        if step is not None:
            signal.setitimer(signal.ITIMER_REAL, self.after, self.gap)
            step()
        while self.left > 0:
            time.sleep(1e-4)


def usual_step(runs: Any, dtype: torch.dtype) -> float:
    """Seconds of a step that nothing interrupts: the median of five."""
    times = []
    for _ in range(5):
        for run in runs:
            run.opt.zero_grad()
            run.model(run.data(4, WIDTH, dtype=dtype)).float().square().mean().backward()
            began = time.monotonic()
            run.opt.step()
        times.append(time.monotonic() - began)
    return sorted(times)[2]


def several_signals(world: World, rounds: int) -> int:
    """Two to five alarms within a millisecond or two, amid a step: it is taken as a whole or not at all, and so is what notes it."""
    dtype = torch.bfloat16
    runs = twins(world, dtype)
    plain, paged = runs
    chance = random.Random(SEED)
    taken = 0
    usual = usual_step(runs, dtype)
    for _ in range(rounds):
        for run in runs:
            run.opt.zero_grad()
            run.model(run.data(4, WIDTH, dtype=dtype)).float().square().mean().backward()
        before = count(paged)
        step = Step(paged.opt.step, chance, usual)
        with contextlib.suppress(KeyboardInterrupt, SystemError):
            funicular._core.complete(step)
        torch.set_grad_enabled(True)
        assert step.left == 0
        # On a busy machine a step takes longer than the first ones did.
        usual *= 1.1
        if count(paged) > before:
            usual *= 0.75
            taken += 1
            plain.opt.step()
        agree(runs, dtype)
    return taken
