"""What updates parameters whose home is the host: the processor, the device's lanes, or both; the same bits every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funicular
from funicular import testing
from models import CUDA, Block, Stack
from twin import FRAMES, Run, World, compare, unit_bytes

pytestmark = pytest.mark.io_engines

#: Blocks whose update is several pieces of 32 Ki elements.
WIDTH = 512 if CUDA else 256
PIECE = 32 * 1024


def build(dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    return lambda: Stack(lambda: Block(WIDTH), depth=4, width=WIDTH).to(dtype)


def room(world: World, model: nn.Module) -> dict[str, str]:
    """A compute tier for three units and for lanes."""

    def frame(size: int) -> int:
        return -(-size // world.granularity) * world.granularity

    elems = sum(p.numel() for p in model.layers[0].parameters())
    group = (elems // 3 // PIECE + 2) * PIECE  # one piece more than enough: parameters are padded
    return {"hbm": f"{FRAMES * frame(max(unit_bytes(model))) + 3 * frame(16 * group)}B"}


def wrap(run: Run, dtype: torch.dtype, where: str, **sections: Any) -> None:
    """Offload with ``optimizer.where``, or with ``halves``: half of the pieces each."""
    model = build(dtype)()
    optimizer = sections.pop("optimizer", {}) | {"where": "gpu" if where == "halves" else where}
    run.model = run.wrap(model, budget=room(run.world, model), optimizer=optimizer, **sections)
    run.opt = run.adamw()
    if run.offloaded and where == "halves":
        assert testing.inspect(run.model).engine.split_updates("halves")


def check_who(run: Run, where: str) -> None:
    """The lanes did what they should have done."""
    if not run.offloaded:
        return
    stats = funicular.stats(run.model)
    by_cpu, by_gpu = stats.updated.cpu > 0, stats.updated.gpu > 0
    assert (by_cpu, by_gpu) == {"cpu": (True, False), "gpu": (False, True), "halves": (True, True)}[where]
    assert (stats.links["gpu_update"].bytes > 0) == by_gpu
    assert ("gpu_update" in str(stats)) == by_gpu


def step(run: Run, dtype: torch.dtype, batches: int = 1, max_norm: float | None = None) -> None:
    for _ in range(batches):
        loss = run.model(run.data(4, WIDTH).to(dtype)).float().square().mean()
        run.record("loss", loss)
        loss.backward()
    if max_norm is not None:
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm))
    run.opt.step()
    run.opt.zero_grad()


def plain_steps(run: Run, dtype: torch.dtype) -> None:
    for _ in range(4):
        step(run, dtype)


def clipping(run: Run, dtype: torch.dtype) -> None:
    """Bites in some steps only."""
    for i in range(5):
        step(run, dtype, max_norm=1e-3 if i % 2 else 1e3)


def accumulation(run: Run, dtype: torch.dtype) -> None:
    for batches in (1, 3, 2):
        step(run, dtype, batches)


def edited_weights(run: Run, dtype: torch.dtype) -> None:
    """Their master starts anew."""
    for _ in range(3):
        step(run, dtype)
        with torch.no_grad():
            run.model.layers[1].up.weight.mul_(1.25)


def two_groups(run: Run, dtype: torch.dtype) -> None:
    """Several spans in a unit, short ones among them."""
    decay = [p for p in run.model.parameters() if p.dim() > 1]
    rest = [p for p in run.model.parameters() if p.dim() < 2]
    run.opt = run.adamw([{"params": rest, "weight_decay": 0.0}, {"params": decay, "maximize": True}])
    plain_steps(run, dtype)


SCRIPTS = [plain_steps, clipping, accumulation, edited_weights, two_groups]


@pytest.mark.covering(2)
@pytest.mark.parametrize("spare", ["0B", "32MiB"], ids=["", "ahead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("where", ["cpu", "gpu", "halves"])
def test_same_bits(host_world: World, where: str, dtype: torch.dtype, spare: str):
    def all_of(run: Run) -> None:
        for script in SCRIPTS:
            wrap(run, dtype, where, optimizer={"spare": spare})
            script(run, dtype)
            run.record_weights()
            check_who(run, where)

    compare(host_world, None, all_of)


@pytest.mark.parametrize("where", ["gpu", "halves"])
def test_states_on_disk(world: World, where: str):
    """They pass through a slot, piece by piece."""

    def script(run: Run) -> None:
        wrap(run, torch.bfloat16, where)
        clipping(run, torch.bfloat16)
        check_who(run, where)

    compare(world, None, script)


@pytest.mark.parametrize("where", ["gpu", "halves"])
def test_without_poison(two_worlds: World, where: str):
    def script(run: Run) -> None:
        wrap(run, torch.float32, where, debug={"poison": False})
        plain_steps(run, torch.float32)

    compare(two_worlds, None, script)


def test_changed_at_any_time(host_world: World):
    """Between steps, also while an update ahead of the step is under way."""

    def script(run: Run) -> None:
        wrap(run, torch.bfloat16, "gpu", optimizer={"spare": "32MiB"})
        for split in ("rates", "halves", "processor", "lanes", "rates", "halves"):
            loss = run.model(run.data(4, WIDTH).to(torch.bfloat16)).float().square().mean()
            loss.backward()
            if run.offloaded:
                assert testing.inspect(run.model).engine.split_updates(split)
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, None, script)


def test_unwrapped_with_updates_under_way(host_world: World):
    def script(run: Run) -> None:
        for _ in range(4):
            wrap(run, torch.float32, "gpu", optimizer={"spare": "32MiB"})
            step(run, torch.float32)
            if run.offloaded:
                run.model = funicular.unwrap(run.model)
            run.record_weights()

    compare(host_world, None, script)


def test_what_it_takes_of_the_compute_tier(host_world: World):
    """Refused with the size that would do, and counted."""
    model = build()()
    with pytest.raises(funicular.BudgetError, match=r"FN-E201.*optimizer\.where is gpu") as refused:
        funicular.offload(model, host_world.policy(model, optimizer={"where": "gpu"}))
    needed = str(refused.value).split("Raise budget.hbm to ")[1].split(",")[0]
    funicular.offload(model, host_world.policy(model, optimizer={"where": "gpu"}, budget={"hbm": needed}))
    hbm = funicular.stats(model).budgets["hbm"]
    assert hbm.limit is not None
    assert hbm.used <= hbm.limit
    assert hbm.used > 3 * 16 * PIECE
    funicular.unwrap(model)
    # The policy does not ask for it: the ring comes first.
    funicular.offload(model, host_world.policy(model))
    assert not testing.inspect(model).engine.split_updates("lanes")


@pytest.mark.parametrize(("dtype", "each"), [(torch.float32, 28), (torch.bfloat16, 26)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", ["cpu", "gpu", "halves"])
def test_traffic_is_counted_where_it_is(host_world: World, where: str, dtype: torch.dtype, each: int):
    """The processor's in memory, the lanes' over the link: together every parameter's bytes once a step."""
    run = Run(host_world, True)
    wrap(run, dtype, where, optimizer={"spare": "0B"})
    plain_steps(run, dtype)
    testing.inspect(run.model).engine.settle_all()
    stats = funicular.stats(run.model)
    sizes = [p.numel() for p in run.model.parameters()]
    cpu, gpu = stats.links["cpu_update"].bytes, stats.links["gpu_update"].bytes
    assert 4 * each * sum(sizes) <= cpu + gpu
    if not stats.ahead.weights_first:  # those pass over some arrays twice, and may come on a GPU
        assert cpu + gpu <= 4 * each * (sum(sizes) + 128 * len(sizes))
        assert (cpu, gpu) == (each * stats.updated.cpu, each * stats.updated.gpu)


def test_unknown_split(host_world: World):
    run = Run(host_world, True)
    run.model = run.wrap(build()())
    with pytest.raises(ValueError, match="everybody"):
        testing.inspect(run.model).engine.split_updates("everybody")


def test_traced(host_world: World, tmp_path: Path):
    """Each side has a track of its own."""
    path = tmp_path / "trace.json"
    run = Run(host_world, True)
    wrap(run, torch.float32, "halves", log={"trace": str(path), "trace_steps": [2, 3]})
    plain_steps(run, torch.float32)
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["cat"] for e in events if e["ph"] == "X"}
    assert {"cpu update", "gpu update"} <= tracks


@pytest.mark.gpu
def test_by_default_both_update(host_world: World):
    """Once the rates are known, a large unit is shared."""
    width = 4096
    model = nn.Sequential(*[nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(4)])
    policy = host_world.policy(model, budget={"hbm": "1GiB", "host": "4GiB"})
    funicular.offload(model, policy)
    opt = funicular.AdamW(model.parameters())
    for _ in range(20):
        model(torch.ones(4, width, device="cuda", dtype=torch.bfloat16)).float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    updated = funicular.stats(model).updated
    assert updated.cpu > 0
    assert updated.gpu > 0
