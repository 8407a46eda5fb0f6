"""Modules around an offloaded model, given to save, load, stats and unwrap: they work, or the error names what to give."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funicular
from models import WIDTH
from twin import Run, World


class Wrapper(nn.Module):
    """A model with a head of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


def wrapped(world: World, seed: int, offloaded: bool = True) -> Run:
    run = Run(world, offloaded)
    inner = run.wrap(net(seed))
    run.model = Wrapper(inner).to(run.device) if not offloaded else Wrapper(inner)
    run.model.head.to(run.device)
    run.opt = funicular.AdamW(run.model.parameters(), lr=1e-2)
    return run


def steps(run: Run) -> list[float]:
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        loss = run.model(torch.randn(5, WIDTH, device=run.device)).pow(2).mean()
        loss.backward()
        run.opt.step()
        run.opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("wait", [True, False])
def test_saved_and_loaded_as_a_whole(wait: bool, two_worlds: World, tmp_path: Path):
    """The wrapper's own parameters are part of it, and their states."""
    run = wrapped(two_worlds, 1)
    steps(run)
    handle = funicular.save(run.model, run.opt, tmp_path / "c", wait=wait)
    expected = steps(run)
    handle.wait()
    for offloaded in (True, False):
        other = wrapped(two_worlds, 2, offloaded)
        funicular.load(tmp_path / "c", other.model, other.opt)
        assert steps(other) == expected


def test_stats_and_unwrap(two_worlds: World):
    run = wrapped(two_worlds, 1)
    steps(run)
    assert funicular.stats(run.model).steps == 3
    plain = wrapped(two_worlds, 1, False)
    steps(plain)
    assert funicular.unwrap(run.model) is run.model
    assert all(type(p) is nn.Parameter for p in run.model.parameters())
    assert steps(run) == steps(plain)
    with pytest.raises(funicular.UsageError, match="FN-E114"):
        funicular.stats(run.model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("around", [nn.Sequential, nn.DataParallel, compiled, nn.ModuleList])
def test_other_wrappers(around: Any, host_world: World, tmp_path: Path):
    inner = Run(host_world, True).wrap(net(1))
    model = around([inner]) if around is nn.ModuleList else around(inner)
    funicular.save(model, None, tmp_path / "c")
    funicular.load(tmp_path / "c", model)
    assert funicular.stats(model).steps == 0
    funicular.unwrap(model)
    assert all(type(p) is nn.Parameter for p in inner.parameters())


def asked(model: Any, path: Path, says: str) -> None:
    """Every function refuses by name, before anything is touched."""
    calls = [
        lambda: funicular.save(model, None, path / "new"),
        lambda: funicular.load(path / "c", model),
        lambda: funicular.stats(model),
        lambda: funicular.unwrap(model),
    ]
    for call in calls:
        with pytest.raises(funicular.UsageError, match=f"FN-E114.*{says}"):
            call()
    assert not (path / "new").exists()


def test_what_has_no_answer_names_what_to_give(host_world: World, tmp_path: Path):
    """A part of an offloaded model, several models, another module over its weights, and what is no module."""
    inner = Run(host_world, True).wrap(net(1))
    funicular.save(inner, None, tmp_path / "c")
    asked(inner[2], tmp_path, "its part '2'.*Sequential")
    asked(nn.ModuleList([inner[0]]), tmp_path, "'0.weight' belongs to an offloaded model")
    other = Run(host_world, True).wrap(net(2))
    asked(nn.ModuleDict({"a": inner, "b": other}), tmp_path, "several.*model.a, model.b")
    asked(SimpleNamespace(model=inner), tmp_path, r"not a torch\.nn\.Module.*model\.model")
    asked([inner], tmp_path, "list, not a torch.nn.Module")
    x = torch.ones(1, WIDTH, device=inner[0].weight.device)
    assert torch.equal(inner(x), net(1).to(x.device)(x))
