"""What ranks run that load checkpoints: each function returns what a rank has read, and was told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_checks import message, train_alone, train_one, values
from rank_scripts import wide
from torch import nn

import funicular
from mutations import wrap
from twin import SEED, World


def lying() -> nn.Module:
    """A model with weights whose elements lie in another order: they take another way than the contiguous ones."""
    model = wide()
    for layer in model.layers:
        layer.up.weight = nn.Parameter(layer.up.weight.detach().t().contiguous().t())
    return model


def offloaded(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, and its optimizer."""
    torch.manual_seed(SEED)
    model = lying()
    funicular.offload(model, world.policy(model))
    return model, funicular.AdamW(model.parameters(), lr=1e-2)


def train_and_save(folder: Path, world: World) -> list[list[torch.Tensor]]:
    """Save after two steps of a process alone; weights and states."""
    model, opt = offloaded(world)
    train_alone(model, opt)
    funicular.save(model, opt, folder)
    return values(model, opt)


def same(one: list[list[torch.Tensor]], other: list[list[torch.Tensor]]) -> bool:
    """Whether weights and states are equal."""
    return all(
        torch.equal(a.cpu(), b.cpu()) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


def loads(saved: str, damaged: str, world: World) -> dict[str, Any]:
    """Load a checkpoint into a model on the meta device, into one that has states, and into a new one; and a damaged one before each."""
    found: dict[str, Any] = {}
    read: list[tuple[Any, ...]] = []

    def restoring(original: Any) -> Any:
        def restore(engine: Any, source: Any, items: Any, *rest: Any) -> Any:
            read.extend((i.place.unit, i.place.section, i.place.start, i.place.state) for i in items)
            return original(engine, source, items, *rest)

        return restore

    def filling(original: Any) -> Any:
        def fill(self: Any, batch: Any) -> Any:
            read.extend((one.name,) for one, _ in batch if one.shared is not None)
            return original(self, batch)

        return fill

    def taken() -> list[tuple[Any, ...]]:
        parts = [*read]
        read.clear()
        return parts

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "funicular._core.restore", restoring)
        wrap(patch, "funicular.checkpoint.restore.Loader._fill", filling)
        with torch.device("meta"):
            model = lying()
        policy = world.policy(wide())
        found["damaged, meta"] = message(lambda: funicular.offload(model, policy, checkpoint=damaged))
        taken()
        funicular.offload(model, policy, checkpoint=saved)
        found["read, meta"] = taken()
        found["meta"] = [p.detach().clone() for p in model.parameters()]

        model, opt = offloaded(world)
        train_one(model, opt, 7)
        before = values(model, opt)
        found["damaged, with states"] = message(lambda: funicular.load(damaged, model, opt))
        found["unchanged"] = same(values(model, opt), before)
        taken()
        funicular.load(saved, model, opt)
        found["read, with states"] = taken()
        found["with states"] = values(model, opt)
        found["step"] = message(lambda: train_one(model, opt, 8))

        new, its = offloaded(world)
        found["damaged, new"] = message(lambda: funicular.load(damaged, new, its))
        found["refused"] = message(lambda: train_one(new, its, 8))
        funicular.load(saved, new, its)
        found["new"] = values(new, its)
    return found
