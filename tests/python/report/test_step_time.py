"""What a run says about its time: each step's split adds up, goes to what was slow, and names what binds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funicular
from funicular import StepTime, testing
from models import CUDA, Block, Stack
from twin import World

# Times are told apart by what is slow: nothing else may keep the processor, the GPU or the disk busy.
pytestmark = [pytest.mark.timing, pytest.mark.io_engines]

WIDTH = 512 if CUDA else 256
DEPTH = 6
#: What a slow thing takes; the step is made of little else. Beside a GPU the program itself takes milliseconds for a step.
SLOW = 0.05 if CUDA else 0.02
DELAY = f"{int(SLOW * 1e3)}ms"
#: How often a copy is made on a slow link. On a GPU its queue must hold all that are under way, so they are larger instead: a unit
#: takes 30 ms there.
TIMES = 50 if CUDA else 400
LINK_WIDTH = 2048 if CUDA else WIDTH
ALWAYS = "@1x1000000"


class SlowBlock(Block):
    """A block whose forward takes its time on the device that computes."""

    def forward(self, x: Tensor) -> Tensor:
        if CUDA:
            torch.cuda._sleep(int(SLOW * 2e9))  # cycles, and no GPU of today makes more in a second
        else:
            time.sleep(SLOW)
        return super().forward(x)


def offloaded(
    world: World, block: Callable[[int], nn.Module] = Block, width: int = WIDTH, **sections: Any
) -> tuple[nn.Module, Callable[[], None]]:
    """A model and a function that takes a step with it."""
    torch.manual_seed(0)
    model = Stack(lambda: block(width), DEPTH, width=width).to(world.torch_device)
    policy = world.policy(model, **{"debug": {"poison": False}, **sections})
    funicular.offload(model, policy)
    opt = funicular.AdamW(model.parameters())
    x = torch.randn(4, width, device=world.torch_device)

    def step() -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
        if CUDA:
            torch.cuda.synchronize()

    return model, step


def adds_up(step: StepTime | None, wall: float | None = None) -> bool:
    """Compute and stalls are the wall's time within 2 %."""
    assert step is not None
    assert step.compute > 0
    assert all(seconds >= 0 for seconds in step.stalls.values())
    return abs(step.compute + step.stalled - (wall or step.seconds)) <= 0.02 * step.seconds


@pytest.mark.covering(1, times=2)
@pytest.mark.parametrize("slow", ["compute", "update", "disk", "link"])
def test_adds_up(world: World, slow: str):
    """Of the last step and of the mean, by the runtime's clock of the wall and by this test's."""
    faults = {
        "update": f"update:delay={DELAY}",
        "disk": f"read:delay=10ms{ALWAYS}",
        "link": "up:times=50,down:times=50",
    }
    model, step = offloaded(world, SlowBlock, debug={"faults": faults.get(slow, ""), "poison": False})
    ends = []
    for _ in range(5):
        step()
        ends.append(time.perf_counter())
    stats = funicular.stats(model)
    assert (stats.timed, stats.lost) == (4, 0)
    # Over all of them: another program may come between any two looks at a clock.
    assert adds_up(stats.step, (ends[-1] - ends[0]) / 4), stats
    assert adds_up(stats.last), stats
    assert adds_up(stats.step), stats


SLOWED: list[tuple[str, str, Callable[[int], nn.Module], str]] = [
    ("compute", "", SlowBlock, "host"),
    ("cpu_update", f"update:delay={DELAY}", Block, "host"),
    ("host_to_device", f"up:times={TIMES}", Block, "host"),
    ("device_to_host", f"down:times={TIMES}", Block, "host"),
    ("nvme_read", f"read:delay={DELAY}{ALWAYS}", Block, "nvme-threads"),
    ("nvme_write", f"write:delay={DELAY}{ALWAYS}", Block, "nvme-threads"),
    ("cpu_update", f"update:delay={DELAY}", Block, "nvme-threads"),
    ("nvme_read", f"read:delay={DELAY}{ALWAYS}", Block, "states"),
    ("nvme_write", f"write:delay={DELAY}{ALWAYS}", Block, "states"),
    ("cpu_update", f"update:delay={DELAY}", Block, "states"),
]


@pytest.mark.parametrize(("expected", "faults", "block", "tiers"), SLOWED)
def test_what_is_slow_binds(disk: str, expected: str, faults: str, block: Callable[[int], nn.Module], tiers: str):
    """One thing is made slow, and the answer is that thing."""
    places = {"host": ("host", "host"), "nvme-threads": ("nvme", "nvme"), "states": ("host", "nvme")}[tiers]
    world = World("cuda" if CUDA else "host", (disk,), *places)
    width = LINK_WIDTH if "times" in faults else WIDTH
    model, step = offloaded(world, block, width, debug={"faults": faults, "poison": False})
    for _ in range(4):
        step()
    stats = funicular.stats(model)
    assert stats.binding == expected, stats
    assert re.search(rf"bound by +{expected} \(", str(stats)), stats


@pytest.mark.skipif(CUDA, reason="on a GPU updates and compute overlap")
def test_time_goes_where_it_belongs(host_world: World):
    """Sleeps never take less than they should: what slept has at least that time."""
    model, step = offloaded(host_world, SlowBlock, debug={"faults": f"update:delay={DELAY}", "poison": False})
    for _ in range(3):
        step()
    stats = funicular.stats(model)
    units = testing.inspect(model).units
    assert stats.last is not None
    assert stats.last.compute >= DEPTH * SLOW
    # The runner may be through with part of the first piece before the thread waits.
    assert stats.last.stalls["update"] >= (len(units) - 1) * SLOW
    assert stats.last.busy["cpu_update"] >= len(units) * SLOW
    assert stats.last.stalls["nvme_read"] == stats.last.stalls["nvme_write"] == 0


def test_from_the_first_step_on(host_world: World):
    """None before a step; the first alone; then the others without it."""
    model, step = offloaded(host_world)
    stats = funicular.stats(model)
    assert stats.step is None
    assert stats.last is None
    assert stats.binding == "compute"
    step()
    stats = funicular.stats(model)
    assert stats.timed == 1
    assert stats.step == stats.last
    first = stats.last
    step()
    step()
    stats = funicular.stats(model)
    assert stats.timed == 2
    assert stats.step is not None
    assert stats.last is not None
    assert stats.step != first
    assert stats.step.seconds <= stats.last.seconds + funicular.stats(model).seconds


def test_a_trace_agrees(world: World, tmp_path: Path):
    """The compute stream's track fills the traced step without gaps, waits are the stalls, and copies are the links' time."""
    path = tmp_path / "trace.json"
    model, step = offloaded(world, SlowBlock, log={"trace": str(path), "trace_steps": [3]})
    for _ in range(3):
        step()
    last = funicular.stats(model).last
    assert last is not None
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    compute = [e for e in events if e["cat"] == "compute"]
    assert {e["name"].split()[0] for e in compute} >= {"forward", "backward", "wait:"}
    total = sum(e["dur"] for e in compute) / 1e6
    assert total == pytest.approx(last.seconds, rel=0.02)
    waits = sum(e["dur"] for e in compute if e["name"].startswith("wait:")) / 1e6
    assert waits == pytest.approx(last.stalled, rel=0.02, abs=1e-4)
    ends = [e["ts"] + e["dur"] for e in compute]
    gaps = [e["ts"] - end for e, end in zip(compute[1:], ends, strict=False)]
    # Microseconds; on a GPU each time is rounded to half of one.
    assert all(abs(gap) < 5 for gap in gaps), gaps
    down = sum(e["dur"] for e in events if e["cat"] == "down") / 1e6
    assert down == pytest.approx(last.busy["device_to_host"], rel=0.02, abs=1e-4)


# ------------------------------------------------------------------ NVTX


class Recorder:
    """Stands in for torch's functions: names of ranges as they start and end."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.under_way: dict[int, str] = {}

    def start(self, name: str) -> int:
        self.started.append(name)
        self.under_way[len(self.started)] = name
        return len(self.started)

    def end(self, started: int) -> None:
        del self.under_way[started]


def recorded(model: nn.Module) -> Recorder:
    recorder = Recorder()
    testing.inspect(model).record_ranges(recorder.start, recorder.end)
    return recorder


def test_ranges(host_world: World):
    """Forward and backward of every unit in their order, then the step; every range ends once."""
    model, step = offloaded(host_world)
    step()
    recorder = recorded(model)
    step()
    layers = [f"layers.{i}" for i in range(DEPTH)]
    of = lambda what: [n for n in recorder.started if n.endswith(what) and ".layers" not in n and "layers" in n]
    assert of("forward") == [f"funicular: {name} forward" for name in layers]
    assert of("backward") == [f"funicular: {name} backward" for name in reversed(layers)]
    assert recorder.started[-1] == "funicular: step"
    assert not recorder.under_way


def test_ranges_end_with_an_exception(host_world: World):
    class Fails(Block):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model, _ = offloaded(host_world, Fails)
    recorder = recorded(model)
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(4, WIDTH, device=host_world.torch_device))
    assert "funicular: layers.0 forward" in recorder.started
    assert not recorder.under_way


def test_ranges_are_only_where_asked_for(host_world: World):
    """Without a GPU ``log.nvtx`` does nothing; on one it is torch's own ranges."""
    model, step = offloaded(host_world, log={"nvtx": True})
    assert (testing.inspect(model).start_range("x") is not None) == CUDA
    step()
    other, _ = offloaded(host_world)
    assert testing.inspect(other).start_range("x") is None


@pytest.mark.parametrize(
    ("update", "copy", "cpu", "up", "binds"),
    [
        (0.14, 0.20, 0.53, 0.20, "cpu_update"),  # each copy comes after an update, which takes longer
        (0.14, 0.20, 0.20, 0.53, "host_to_device"),
        (0.02, 0.20, 0.53, 0.30, "cpu_update"),  # most updates end while the window before them is open
        (0.01, 0.20, 0.53, 0.30, "host_to_device"),  # updates are done in time
        (0.01, 0.02, 0.53, 0.30, "compute"),
    ],
)
def test_the_slower_stage_of_a_chain_binds(update: float, copy: float, cpu: float, up: float, binds: str):
    stalls = {"update": update, "nvme_read": 0.0, "nvme_write": 0.0, "copy": copy, "grads": 0.0}
    busy = dict.fromkeys(
        ("host_to_device", "device_to_host", "nvme_read", "nvme_write", "cpu_update", "gpu_update"), 0.0
    )
    step = StepTime(1.15, 0.8, stalls, busy | {"cpu_update": cpu, "host_to_device": up})
    assert step.binding == binds
