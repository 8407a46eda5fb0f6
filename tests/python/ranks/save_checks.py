"""What ranks run beside saves that read while training goes on: functions that return what a test looks at."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from crossed_checks import await_file
from rank_checks import message, offloaded, train_one
from torch import nn

import facts
import funicular
from funicular.checkpoint import save_load
from twin import World

#: steps before the save, and after it
BEFORE, AFTER = 3, 4


def _marked(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a buffer: what is no unit's is read before any unit, and a save asks then whether it was changed."""
    model, opt = offloaded(world)
    model.register_buffer("mark", torch.arange(4.0))
    return model, opt


def _before_units(does: Callable[[], None]) -> AbstractContextManager[object]:
    """Have a save of this rank do this when it has read what is no unit's, for which the next step of the optimizer waits."""

    class Read(threading.Event):
        def set(self) -> None:
            super().set()
            does()

    return mock.patch.object(save_load, "threading", SimpleNamespace(Event=Read))


def _noted(event: str, rank: int) -> Path:
    return Path(os.environ["RANKS_FOLDER"]) / f"{event} {rank}"


def _others() -> list[int]:
    return [rank for rank in range(dist.get_world_size()) if rank]


def _await(event: str) -> None:
    for rank in _others():
        await_file(_noted(event, rank))


def waited(folder: str, world: World) -> None:
    """Train, save, and train on."""
    model, opt = _marked(world)
    for step in range(BEFORE):
        train_one(model, opt, step)
    funicular.save(model, opt, folder)
    for step in range(BEFORE, BEFORE + AFTER):
        train_one(model, opt, step)
    funicular.save(model, opt, f"{folder}-end")


def beside(folder: str, world: World) -> list[str]:
    """The same, where no unit is read before all have come to the next step. The events of rank 0, in order."""
    model, opt = _marked(world)
    rank, events = dist.get_rank(), []

    def next_steps() -> None:
        _noted("begun", rank).touch()
        _await("at the step")
        facts.rest(0.3)
        events.append("read")

    for step in range(BEFORE):
        train_one(model, opt, step)
    with _before_units(next_steps):
        handle = funicular.save(model, opt, folder, wait=False)
        if rank == 0:
            assert not handle.done()
            # From here on no unit is read, also none that an update waits for.
            await_file(_noted("begun", rank))
        events.append("returned")
        at_step = opt.register_step_pre_hook(lambda *_: _noted("at the step", rank).touch())
        for step in range(BEFORE, BEFORE + AFTER):
            train_one(model, opt, step)
        at_step.remove()
        handle.wait()
    funicular.save(model, opt, f"{folder}-end")
    return events


def killed(folder: str, world: World) -> list[str]:
    """Rank 0 is killed before its save has read the model, when the others wait for it; what they are told."""
    model, opt = _marked(world)
    rank = dist.get_rank()

    def die() -> None:
        _noted("begun", rank).touch()
        _await("at the step")
        facts.rest(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    for step in range(2):
        train_one(model, opt, step)
    funicular.save(model, opt, f"{folder}-before")
    with _before_units(die):
        funicular.save(model, opt, folder, wait=False)
        if rank == 0:
            await_file(_noted("begun", rank))

        def goes_on() -> None:
            opt.register_step_pre_hook(lambda *_: _noted("at the step", rank).touch())
            for step in range(2, 6):
                train_one(model, opt, step)

        return [message(goes_on)]


def interrupted(folder: str, world: World) -> tuple[str, list[torch.Tensor]]:
    """Rank 0 is interrupted in a save that it waits for, and goes on, as the others do. What it was told, and the weights."""
    model, opt = _marked(world)
    for step in range(2):
        train_one(model, opt, step)
    said = ""

    def strike() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await_file(_noted("interrupted", 0))

    with _before_units(strike):
        try:
            funicular.save(model, opt, folder)
        except KeyboardInterrupt:
            said = "KeyboardInterrupt"
            _noted("interrupted", 0).touch()
    for step in range(2, 4):
        train_one(model, opt, step)
    return said, [p.detach().clone() for p in model.parameters()]


def loads_beside(folder: str, world: World) -> None:
    """All load another checkpoint while rank 0 saves."""
    model, opt = _marked(world)
    train_one(model, opt, 0)
    funicular.save(model, opt, f"{folder}-first")
    train_one(model, opt, 1)
    funicular.save(model, opt, f"{folder}-waited")
    with _before_units(lambda: facts.rest(0.3)):
        handle = funicular.save(model, opt, folder, wait=False)
        funicular.load(f"{folder}-first", model, opt)
        handle.wait()
    funicular.save(model, opt, f"{folder}-loaded")
