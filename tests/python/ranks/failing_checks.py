"""What ranks run of which one fails amid a backward, by an exception that its program catches or by what it does: functions that return what a rank was told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from crossed_checks import await_file
from rank_checks import message, offloaded, own_batch, train_one
from torch.utils.checkpoint import checkpoint

import funicular
from twin import World


def caught(world: World, where: str) -> list[str]:
    """Rank 1 fails amid a backward and does nothing of the model until the others have been told; then it goes on. What each is told."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    told = Path(os.environ["RANKS_FOLDER"]) / "told"
    if dist.get_rank() != 1:
        said = message(lambda: train_one(model, opt, 1))
        (told.parent / f"told {dist.get_rank()}").touch()
        return [said]

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    if where == "hook of a tensor":
        model.layers[1].up.weight.register_hook(fail)
    elif where == "hook behind the last gradient":
        model.inp.weight.register_post_accumulate_grad_hook(fail)
    elif where == "hook of a module":
        model.layers[1].register_full_backward_hook(fail)
    else:
        p = model.layers[1].up.weight
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    try:
        model(own_batch(1)).sum().backward()
    except (ZeroDivisionError, funicular.Error) as error:
        first = f"{type(error).__name__} {error}"
    for rank in {*range(dist.get_world_size())} - {1}:
        await_file(told.parent / f"told {rank}")
    return [first, message(lambda: model(torch.ones_like(own_batch(2))))]


#: models that live until Python's own end
_kept: list[object] = []


def outlived(world: World) -> str:
    """Rank 1 ends, and rank 0 waits for it in a backward; what it is told. Its model is there until Python ends."""
    model, opt = offloaded(world)
    _kept.extend([model, opt])
    train_one(model, opt, 0)
    return message(lambda: train_one(model, opt, 1)) if dist.get_rank() == 0 else ""


def hooked(world: World, kind: str) -> list[str]:
    """Hooks in a backward that look at a gradient on its way (``look``), or raise amid the exchange (``raise``)."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    said = ["nothing"]

    def strike(_: Any) -> None:
        if kind == "raise":
            raise ZeroDivisionError
        said[0] = message(lambda: model.out.weight.grad.sum())

    model.inp.weight.register_post_accumulate_grad_hook(strike)
    try:
        model(own_batch(1)).sum().backward()
    except ZeroDivisionError:
        said[0] = message(lambda: model(own_batch(2)).sum().backward())
    except funicular.Error as error:  # of the other rank
        said[0] = str(error)
    return said


def used_again(world: World) -> list[str]:
    """A parameter whose gradient comes twice in the second backward, for the first time."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    x = checkpoint(model.out, model(own_batch(1)).requires_grad_(), use_reentrant=True)
    return [message(lambda: checkpoint(model.inp, x, use_reentrant=True).sum().backward())]
