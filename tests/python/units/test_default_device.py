"""Calls amid ``torch.device(...)``, as Lightning makes ``configure_model``, and under ``torch.set_default_device``: nothing of the runtime goes there."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import funicular
from models import Stack
from twin import Run, World, compare


def test_all_calls(two_worlds: World, tmp_path: Path):
    """Tensors that no one has asked for on another device would have no values there."""

    def script(run: Run) -> None:
        model, folder = Stack(depth=4), tmp_path / str(run.offloaded)
        batches = [run.data(4, model.width) for _ in range(4)]
        with torch.device("meta"):
            run.model = run.wrap(model)
            run.opt = run.adamw()
            for number, x in enumerate(batches):
                loss = run.model(x).square().mean()
                run.record("loss", loss)
                loss.backward()
                run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), 0.01))
                run.opt.step()
                run.opt.zero_grad()
                if number == 1:
                    funicular.save(run.model, run.opt, folder / "state")
                    run.record("steps", [float(s["step"]) for s in run.opt.state_dict()["state"].values()])
            funicular.load(folder / "state", run.model, run.opt)
        run.record("rng", torch.get_rng_state())

    compare(two_worlds, None, script)


class Angles(Stack):
    """Has a table that no checkpoint has, and makes it anew as models of transformers do."""

    def __init__(self) -> None:
        super().__init__(depth=4)
        self.register_buffer("table", torch.empty(4), persistent=False)
        self._init_weights(self)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.table.copy_(torch.arange(4) / 3)


def test_from_a_checkpoint(two_worlds: World, tmp_path: Path):
    """Of a model on the meta device, and of one that has memory."""
    torch.manual_seed(5)
    model = Angles()
    funicular.save(model, None, tmp_path / "w")
    expected = [p.detach().clone() for p in model.parameters()]
    for other in (Angles(), Angles().to("meta")):
        with torch.device("meta"):
            funicular.offload(other, two_worlds.policy(model), checkpoint=tmp_path / "w")
            funicular.unwrap(other)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, other.parameters(), strict=True))
        assert torch.equal(other.table.cpu(), model.table)
