"""Compiled steps of other optimizers beside other threads and saves: their kernels take addresses of weights and ask nothing."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import funicular
from funicular import testing
from models import CUDA, WIDTH, stack
from twin import Run, World, compare

pytestmark = [
    pytest.mark.skipif(CUDA, reason="the processor's kernels are the test's own"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RATE = 1e-2


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Kernels:
    """Compiles to what no guard sees; ``amid`` is called before its kernels run."""

    def __init__(self) -> None:
        self.amid: Callable[[], None] = lambda: None

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.amid()
            with torch._C.DisableTorchFunction():
                return graph(*args)

        return run


def compiled(run: Run) -> tuple[Callable[[], Any], Kernels]:
    opt = torch.optim.SGD(run.model.parameters(), lr=RATE)
    kernels = Kernels()
    run.opt = opt
    step = torch.compile(opt.step, backend=kernels)
    differentiate(run)
    step()  # compiles
    return step, kernels


def differentiate(run: Run) -> None:
    run.opt.zero_grad()
    run.model(run.data(4, WIDTH)).square().mean().backward()


def evaluate(run: Run, seen: list[Tensor]) -> None:
    with torch.no_grad():
        seen.append(run.model(torch.ones(4, WIDTH)))


def values(address: int, count: int) -> list[float]:
    return list((ctypes.c_float * count).from_address(address))


def test_waits_for_another_thread_that_is_inside(two_worlds: World):
    """What that thread's kernels read, by address, stays as it is until they are over."""

    def script(run: Run) -> None:
        step, _ = compiled(run)
        differentiate(run)
        block = run.model.layers[1]
        inside, stepped = threading.Event(), threading.Event()
        same: list[bool] = []

        def kernel(*_: Any) -> None:
            if threading.current_thread() is reader and run.offloaded:
                weight = block.up.weight
                address, before = weight.data_ptr(), weight.detach().flatten().tolist()
                inside.set()
                stepped.wait(2)  # longer than a step that does not wait takes
                same.append(values(address, weight.numel()) == before)

        reader = threading.Thread(target=evaluate, args=(run, []))
        handle = block.norm.register_forward_pre_hook(kernel)
        reader.start()
        assert not run.offloaded or inside.wait(60)
        step()
        stepped.set()
        reader.join()
        handle.remove()
        assert same == [True] * run.offloaded
        run.train(1)

    compare(two_worlds, stack(), script, frames=40)


def test_windows_that_open_amid_a_step(two_worlds: World):
    """Another thread that runs the model meanwhile uses homes: its windows would bring older bytes home."""

    def script(run: Run) -> None:
        step, kernels = compiled(run)
        differentiate(run)
        inside, go_on, seen = threading.Event(), threading.Event(), []
        opened: list[str] = []

        def hold(*_: Any) -> None:
            if threading.current_thread() is reader:
                inside.set()
                assert go_on.wait(60)

        def amid() -> None:
            if not inside.is_set():
                reader.start()
                assert inside.wait(60)
                if run.offloaded:
                    opened.extend(unit.name for unit in testing.inspect(run.model).units if unit.held)

        reader = threading.Thread(target=evaluate, args=(run, seen))
        handle = run.model.layers[1].norm.register_forward_pre_hook(hold)
        kernels.amid = amid
        step()
        kernels.amid = lambda: None
        go_on.set()
        reader.join()
        handle.remove()
        assert opened == []
        run.record_weights()
        differentiate(run)
        step()

    compare(two_worlds, stack(), script, frames=40)


def test_reads_amid_a_step(nvme_world: World):
    """Another thread's reads do not drop the memory that the step edits."""

    def script(run: Run) -> None:
        step, kernels = compiled(run)

        def read() -> None:
            for p in run.model.parameters():
                p.detach().sum()
            if run.offloaded:
                funicular.stats(run.model)
                session: Any = testing.inspect(run.model).session
                session.drop_unused()

        def amid() -> None:
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()
            if run.offloaded:
                assert all(unit.in_memory for unit in testing.inspect(run.model).units)

        differentiate(run)
        kernels.amid = amid
        step()
        kernels.amid = lambda: None
        run.record_weights()
        if run.offloaded:
            read()
            assert not any(unit.in_memory for unit in testing.inspect(run.model).units), "given back after the step"

    compare(nvme_world, stack(), script, frames=40)


def test_a_step_beside_a_save(host_world: World, tmp_path: Path):
    """The save has read a weight before the step edits it."""
    run = Run(host_world, True)
    run.model = stack()()
    run.wrap(run.model, debug={"faults": "write:delay=20ms@1x1000000"})
    step, _ = compiled(run)
    differentiate(run)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    handle = funicular.save(run.model, None, tmp_path / "aside", wait=False, shard_bytes=30_000)
    step()
    handle.wait()
    saved = {
        k: v for file in sorted((tmp_path / "aside").rglob("model*.safetensors")) for k, v in load_file(file).items()
    }
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    assert not all(torch.equal(p.detach(), before[name]) for name, p in run.model.named_parameters())


def test_a_thread_that_stays_inside(host_world: World, monkeypatch: pytest.MonkeyPatch):
    """As one that waits for the step itself."""
    monkeypatch.setattr("funicular.windows.faults._PATIENCE", 0.05)
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    step, _ = compiled(run)
    differentiate(run)
    before = [p.detach().clone() for p in run.model.parameters()]
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if threading.current_thread() is reader:
            inside.set()
            assert go_on.wait(60)

    reader = threading.Thread(target=evaluate, args=(run, []))
    handle = run.model.layers[1].norm.register_forward_pre_hook(hold)
    reader.start()
    assert inside.wait(60)
    with pytest.raises(funicular.UsageError, match="FN-E118"):
        step()
    assert all(torch.equal(a, p.detach()) for a, p in zip(before, run.model.parameters(), strict=True))
    go_on.set()
    reader.join()
    handle.remove()
    step()
    assert not all(torch.equal(a, p.detach()) for a, p in zip(before, run.model.parameters(), strict=True))


@pytest.mark.parametrize("then", ["steps again", "is gone"])
def test_a_step_that_failed(then: str, host_world: World):
    """Other threads use homes until the optimizer has stepped again, or is gone."""
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), frames=40)
    step, kernels = compiled(run)
    differentiate(run)

    def fail() -> None:
        raise ZeroDivisionError

    kernels.amid = fail
    with pytest.raises(ZeroDivisionError):
        step()
    kernels.amid = lambda: None
    if then == "steps again":
        step()
    else:
        run.opt = step = None  # type: ignore[assignment]
        torch._dynamo.reset()
        gc.collect()
    opened: list[bool] = []
    block = run.model.layers[1]
    handle = block.norm.register_forward_pre_hook(
        lambda *_: opened.append(any(unit.held for unit in testing.inspect(run.model).units))
    )
    reader = threading.Thread(target=evaluate, args=(run, []))
    reader.start()
    reader.join()
    handle.remove()
    assert opened == [True]
