"""What ranks run that come to different calls, or are interrupted: each function returns what a rank was told."""

from __future__ import annotations

import os
import pkgutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_checks import message, offloaded, own_batch, train_one
from rank_scripts import DEVICE
from torch import nn

import funicular
from several import PATIENCE
from twin import World

ODD = 1


def crossed(folder: str, world: World) -> dict[str, str]:
    """Rank 1 comes to another call than the others, in several ways; what each rank is told."""
    odd = dist.get_rank() == ODD
    saved = f"{folder}/saved"
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    funicular.save(model, opt, saved)
    said = {}

    def differ(name: str, one: Any, others: Any) -> None:
        """Train, differ, and begin anew."""
        nonlocal model, opt
        train_one(model, opt, 1)
        said[name] = message(one if odd else others)
        said[f"{name}, again"] = message(lambda: train_one(model, opt, 2))
        funicular.unwrap(model)
        model, opt = offloaded(world)

    def step() -> None:
        train_one(model, opt, 1)

    def load() -> None:
        funicular.load(saved, model, opt)

    differ("load and backward", load, step)
    differ("step and load", lambda: opt.step(), load)
    differ("unwrap and backward", lambda: funicular.unwrap(model), step)
    differ("load and unwrap", load, lambda: funicular.unwrap(model))
    differ("offload and backward", lambda: offloaded(world), step)
    # Two models, in another order.
    other, its = offloaded(world)
    for both in (model, other):
        both(own_batch(1)).sum().backward()
    said["two models"] = message(its.step if odd else opt.step)
    said["the first"], said["the second"] = message(opt.step), message(its.step)
    funicular.unwrap(model)
    funicular.unwrap(other)
    # And two backwards.
    first, second = offloaded(world)[0], offloaded(world)[0]
    said["two backwards"] = message(lambda: (second if odd else first)(own_batch(1)).sum().backward())
    return said


def interrupted_waits(world: World) -> list[Any]:
    """Rank 0 is interrupted in a wait at its step, and in ``offload``, and goes on; rank 1 comes later. And :func:`handled`."""
    here = Path(os.environ["RANKS_FOLDER"])
    said: list[Any] = []
    model, opt = offloaded(world)

    def interrupt(what: str, function: str, call: Any, again: Any) -> None:
        """Rank 1 comes when rank 0 was interrupted."""
        if dist.get_rank():
            await_file(here / what)
            again()
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(function, signalled(function))
            try:
                call()
            except KeyboardInterrupt:
                said.append(what)
        (here / what).touch()
        again()

    model(own_batch(0)).sum().backward()
    interrupt("at a step", "funicular._core.at_step", opt.step, opt.step)
    interrupt("in offload", "funicular.ranks.group._await_all", lambda: offloaded(world), lambda: offloaded(world))
    model(own_batch(1)).sum().backward()
    said.append(message(opt.step))
    return [*said, *handled(world)]


def interrupted_exchanges(world: World) -> list[list[str]]:
    """Rank 1 is interrupted amid an exchange, before it sends what rank 0 waits for in torch, and while it waits itself; it lives on meanwhile."""
    return [interrupted_exchange(world, sending=True), interrupted_exchange(world, sending=False)]


def interrupted_exchange(world: World, sending: bool) -> list[str]:
    """What a rank is told, and what it is told then."""
    here, name = Path(os.environ["RANKS_FOLDER"]), "funicular.ranks.group.Group.transfer"
    told, interrupted = here / f"told {sending}", here / f"interrupted {sending}"
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    said = "nothing"
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == ODD:
            patch.setattr(name, signalled(name, before=sending))
        elif not sending:
            patch.setattr(name, held(name, interrupted))
        try:
            said = message(lambda: train_one(model, opt, 1))
        except KeyboardInterrupt:
            said = "KeyboardInterrupt"
    (interrupted if dist.get_rank() == ODD else told).touch()
    await_file(told)
    after = message(opt.step)
    funicular.unwrap(model)
    return [said, after]


def handled(world: World) -> list[Any]:
    """A signal handler that returns, in a wait for a rank that is late and in one for its gradients, changes nothing."""
    here = Path(os.environ["RANKS_FOLDER"])
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    model, opt = offloaded(world)
    # In the thread of a GPU's backward Python looks at no signals.
    waits = {0: "funicular._core.wait_posted", 1: "funicular._core.at_step"}
    if DEVICE.type == "cuda":
        del waits[0]
    for step, function in waits.items():
        told = here / f"seen {step}"
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() and step == 0:
                await_file(told)
            if dist.get_rank() == 0:
                patch.setattr(function, signalled(function, signal.SIGUSR1, told, seen))
            model(own_batch(step)).sum().backward()
            if dist.get_rank() and step == 1:
                await_file(told)
            opt.step()
    return [len(seen) >= len(waits) or dist.get_rank() > 0, model.out.weight.detach().clone()]


def await_file(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def held(function: str, until: Path) -> Any:
    """The function of this name, after a file is there."""
    original = pkgutil.resolve_name(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        await_file(until)
        return original(*args, **kwargs)

    return call


def signalled(
    function: str,
    number: int = signal.SIGINT,
    told: Path | None = None,
    seen: Sequence[int] = (),
    *,
    before: bool = False,
) -> Any:
    """The function of this name, in which a signal comes, or right before it; a file is made when a handler has noted it in ``seen``."""
    original = pkgutil.resolve_name(function)
    count = len(seen)

    def send() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), number)
        if told is not None:
            while len(seen) == count:
                time.sleep(0.01)
            told.touch()

    def call(*args: Any, **kwargs: Any) -> Any:
        if before:
            os.kill(os.getpid(), number)
            time.sleep(PATIENCE)  # the handler comes first
        sender = threading.Thread(target=send)
        sender.start()
        try:
            return original(*args, **kwargs)
        finally:
            sender.join()

    return call


def different_backwards(world: World) -> list[str]:
    """A rank that clears its gradients where the other does not."""
    model, _ = offloaded(world)
    model(own_batch(0)).sum().backward()
    if dist.get_rank():
        model.zero_grad()
    return [message(lambda: model(own_batch(1)).sum().backward())]


def different_in_turn(world: World) -> list[str]:
    """As :func:`different_backwards`, and rank 1 comes to the exchange when rank 0 has seen the difference there, and has left its backward."""
    model, _ = offloaded(world)
    model(own_batch(0)).sum().backward()
    posted, told, done = (Path(os.environ["RANKS_FOLDER"]) / name for name in ("posted", "told", "done"))
    if dist.get_rank() == 0:
        await_file(posted)
        said = message(lambda: model(own_batch(1)).sum().backward())
        told.touch()
        await_file(done)
        return [said]

    def wait(_: torch.Tensor) -> None:
        posted.touch()
        await_file(told)
        time.sleep(0.5)  # its runtime looks for ranks that have failed

    model.zero_grad()
    model.inp.weight.register_hook(wait)
    said = message(lambda: model(own_batch(1)).sum().backward())
    done.touch()
    return [said]


class _Meeting(torch.autograd.Function):
    """A collective of the program's own amid the backward, as that of a SyncBatchNorm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.zeros(1, device=DEVICE))
        return grad


def beside_another(world: World) -> list[int]:
    """Train two models in one backward, of which rank 1 is late in every second one.

    Returns how many bytes of gradients the one whose gradients come last had sent in each backward before its last gradient came.
    """
    (last, _), (first, _) = offloaded(world), offloaded(world)
    opt = funicular.AdamW([*last.parameters(), *first.parameters()], lr=1e-2)
    sent: list[int] = []

    def count() -> int:
        ranks = funicular.stats(last).ranks
        assert ranks is not None
        return ranks.sent

    def late(_: torch.Tensor) -> None:
        if dist.get_rank() == step % 2:
            time.sleep(0.2)

    last.inp.weight.register_hook(lambda grad: sent.append(count() - before))
    for model in (last, first):
        model.layers[1].up.weight.register_hook(late)
    with pytest.MonkeyPatch.context() as patch:
        # NCCL counts no exchanges between pairs; gloo does.
        patch.setattr("funicular.ranks.group.collectives", lambda *_: 0)
        for step in range(4):
            before = count()
            x = last(own_batch(step))
            (x + first(own_batch(step))).sum().backward()
            opt.step()
            opt.zero_grad()
    return sent


def amid_backward(world: World, own: bool) -> list[Any]:
    """Train four steps, with collectives of the program's own amid backwards or without, and rank 1 late in every second one.

    Returns how many bytes of gradients were sent in each backward before its last gradient came, then the weights.
    """
    model, opt = offloaded(world)
    sent: list[int] = []

    def count() -> int:
        ranks = funicular.stats(model).ranks
        assert ranks is not None
        return ranks.sent

    if own:
        for layer in model.layers:
            layer.register_forward_hook(lambda layer, inputs, out: _Meeting.apply(out))
    model.inp.weight.register_hook(lambda grad: sent.append(count() - before))
    for step in range(4):
        before = count()
        if dist.get_rank() == step % 2:
            time.sleep(0.2)
        model(own_batch(step)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        opt.step()
        opt.zero_grad()
    return [sent, [p.detach().clone() for p in model.parameters()]]
