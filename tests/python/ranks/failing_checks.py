"""What ranks run of which one fails by an exception that its program catches: functions that return what a rank was told."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from crossed_checks import await_file
from rank_checks import message, offloaded, own_batch, train_one

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
