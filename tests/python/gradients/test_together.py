"""Units whose weights are made first, units whose states moved up, and units that stream from NVMe, in one model: the same bits."""

from __future__ import annotations

import pytest
import torch

import funicular
from conftest import DEVICE
from funicular import testing
from models import CUDA, WIDTH, stack
from step_scripts import SCRIPTS, loss_of
from twin import Run, World, compare

#: every other block has its states on NVMe, one its weights, too
SOME = [{"match": f"layers.{i}*", "optimizer": "nvme"} for i in (0, 2)] + [
    {"match": "layers.3*", "optimizer": "nvme", "params": "nvme"}
]
#: states follow their weights late, and sums come up, as on a GPU
LATE = {"override": SOME, "optimizer": {"spare": "32MiB"}, "debug": {"faults": "sums:up,states:delay=2ms"}}


@pytest.fixture(params=["host", "nvme"])
def mixed(request: pytest.FixtureRequest, disk: str) -> World:
    """Gradients in host memory, and on NVMe, those of units with states in host memory, too."""
    return World(DEVICE, (disk,), gradients=request.param)


@pytest.mark.covering(1)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_same_bits(mixed: World, script):
    compare(mixed, stack(), script, **LATE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(mixed: World, dtype: torch.dtype):
    def script(run: Run) -> None:
        for step in range(6):
            for _ in range(1 + step // 3):
                run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e3 if step % 3 == 2 else 1e-2))
            run.opt.step()
            run.opt.zero_grad()

    compare(mixed, lambda: stack()().to(dtype), script, **LATE)


@pytest.mark.skipif(CUDA, reason="a GPU tells how much of its memory is free")
@pytest.mark.parametrize("clip", [1e-3, 1e9])
def test_states_that_move_up_beside_others(mixed: World, clip: float):
    """States move up where all of a unit lives in host memory, and stay where its gradients live on NVMe."""

    def script(run: Run) -> None:
        for step in range(24):
            if run.offloaded:
                testing.inspect(run.model).make_memory_up(8 << 20, 1 << 20 if step % 12 < 9 else 8 << 20)
            for _ in range(1 + step % 2):
                loss_of(run).backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), clip))
            run.opt.step()
            run.opt.zero_grad()
        run.record("states", [run.opt.state[p]["exp_avg_sq"] for p in run.model.parameters()])

    run = compare(mixed, stack(), script, budget={"hbm": None}, **LATE)
    stats = funicular.stats(run.model)
    moved = {move.unit for move in stats.grown.moves}
    assert not moved & {f"layers.{i}" for i in (0, 2, 3)}
    assert bool(moved) == (mixed.gradients == "host")


def test_each_mechanism_is_used(mixed: World):
    """Weights come first where gradients are in host memory, updates of the other units begin in backward."""
    model = stack()()
    funicular.offload(model, mixed.policy(model, **LATE))
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    for step in range(8):
        model(torch.randn(4, WIDTH, device=mixed.torch_device)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3 if step % 4 == 3 else 1e9)
        opt.step()
        opt.zero_grad()
    for p in model.parameters():
        p.detach().sum()
    ahead = funicular.stats(model).ahead
    assert ahead.used > 0
    assert (ahead.weights_first > 0) == (mixed.gradients == "host")
    funicular.unwrap(model)
