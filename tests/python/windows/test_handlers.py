"""Signal handlers that use the model at every point: what they do works or is refused by name, and what they struck is exact."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import children
import forks
import funicular
import handlers
from conftest import DEVICE, PLACEMENTS
from funicular import testing
from models import WIDTH, stack
from twin import Run, World, compare

#: handlers that change nothing, and handlers after which a checkpoint is loaded
CHANGING = ("clears", "steps", "trains", "loads")
EVERY = "FUNICULAR_EVERY_POINT" in os.environ
ACTIONS = ("differentiate", "step", "look", "save", "load")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs the exception table of Python 3.11")
# The order decides which actions are chosen with the disk: those that read it themselves.
@pytest.mark.covering(1)
@pytest.mark.parametrize("placement", ["nvme-threads", "host"])
@pytest.mark.parametrize("action", ACTIONS)
def test_at_every_point(action: str, placement: str, disk: str):
    strikes = [*handlers.HARMLESS, *CHANGING]
    if action == "look":
        strikes.remove("loads")  # states that are being read are not those of the optimizer any more
    if action == "load":
        strikes.remove("reads")  # states that are being replaced have no entries yet
    # One point in seventy and one of each file, each with the next handler; ``make soak`` strikes at every one with each of them.
    body = f"import forks, handlers\nprint(handlers.struck(world, {action!r}, {strikes!r}, every={EVERY}))\nforks.end()"
    status, out, err = children.finish(
        children.start(body, disk, PLACEMENTS[placement], DEVICE), 20_000 if EVERY else children.PATIENCE
    )
    assert status == 0, f"{out}\n{err[-3000:]}"
    assert int(out) > 60, "the points were not found"


@pytest.mark.parametrize("grads", [False, True])
def test_a_model_that_comes_and_goes_within_a_backward(grads: bool, host_world: World):
    """As an evaluation in a signal handler or in a hook of a gradient does."""

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def other(grad: torch.Tensor) -> None:
        inner = funicular.offload(build(), host_world.policy(build()))
        with torch.set_grad_enabled(grads):
            inner(torch.ones(1, 8, device=host_world.torch_device))
        funicular.unwrap(inner)

    plain = build().to(host_world.torch_device)
    paged = funicular.offload(build(), host_world.policy(build()))
    for model in (plain, paged):
        y = model(torch.ones(1, 8, device=host_world.torch_device))
        if model is paged:
            y.register_hook(other)
        y.square().sum().backward()
    for p, q in zip(plain.parameters(), paged.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def forward(run: Run, folder: Path) -> Callable[[], Any]:
    return lambda: run.model(torch.ones(1, WIDTH, device=run.device))


def forward_of_a_block(run: Run, folder: Path) -> Callable[[], Any]:
    return lambda: run.model.layers[1](torch.ones(1, WIDTH, device=run.device))


def backward(run: Run, folder: Path) -> Callable[[], Any]:
    loss = run.model(torch.ones(1, WIDTH, device=run.device)).square().mean()
    return lambda: loss.backward()


def step(run: Run, folder: Path) -> Callable[[], Any]:
    run.model(torch.ones(1, WIDTH, device=run.device)).square().mean().backward()
    return run.opt.step


def compiled_step(run: Run, folder: Path) -> Callable[[], Any]:
    opt = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.model(torch.ones(1, WIDTH, device=run.device)).square().mean().backward()
    return torch.compile(opt.step, backend="eager")


def load(run: Run, folder: Path) -> Callable[[], Any]:
    funicular.save(run.model, run.opt, folder / "saved")
    run.train(1, look=False)
    return lambda: funicular.load(folder / "saved", run.model, run.opt)


def unwrap(run: Run, folder: Path) -> Callable[[], Any]:
    return lambda: funicular.unwrap(run.model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "action", [forward, forward_of_a_block, backward, step, compiled_step, load, unwrap], ids=lambda f: f.__name__
)
def test_refused_amid_the_work_of_the_session(
    action: Callable[[Run, Path], Callable[[], Any]], host_world: World, tmp_path: Path
):
    """Each place that refuses a handler: its thread has the session's lock, whatever the work is."""
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    run.opt = run.adamw()
    run.train(2, look=False)
    act = action(run, tmp_path)
    before = [p.detach().clone() for p in run.model.parameters()]
    session: Any = testing.inspect(run.model).session
    with session.lock, pytest.raises(funicular.RuntimeFailure, match="FN-E106"):
        act()
    assert testing.is_offloaded(run.model)
    assert all(torch.equal(a, p.detach()) for a, p in zip(before, run.model.parameters(), strict=True))
    run.train(1)


def test_refused_in_another_thread_of_a_backward(host_world: World):
    """On a GPU a backward has a thread of its own: it must not wait for the handler's, which waits for it."""
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    run.opt = run.adamw()
    run.train(2, look=False)
    loss = run.model(torch.ones(1, WIDTH, device=run.device)).square().mean()
    said: list[str] = []

    def differentiate() -> None:
        try:
            loss.backward()
        except funicular.RuntimeFailure as error:
            said.append(error.code)

    def elsewhere(grad: torch.Tensor) -> None:
        other = threading.Thread(target=differentiate, daemon=True)
        other.start()
        other.join(20)
        assert not other.is_alive(), "it waits for this thread"

    handler = torch.ones(1, requires_grad=True)
    (doubled := handler * 2).register_hook(elsewhere)
    session: Any = testing.inspect(run.model).session
    with session.lock:
        doubled.sum().backward()
    assert said == ["FN-E106"]
    run.train(1)


def test_a_lock_that_is_held_for_long_is_waited_for(host_world: World, monkeypatch: pytest.MonkeyPatch):
    """By a backward, where the session works for another thread, amid a backward of that one."""
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    run.opt = run.adamw()
    run.train(2, look=False)
    losses = [run.model(torch.ones(1, WIDTH, device=run.device)).square().mean() for _ in range(2)]
    session: Any = testing.inspect(run.model).session
    held = threading.Event()

    def hold() -> None:
        held.set()
        time.sleep(0.7)

    monkeypatch.setattr(session.windows, "recover", hold)
    losses[0].register_hook(lambda _: session.recover())
    first = threading.Thread(target=losses[0].backward)
    first.start()
    assert held.wait(20)
    losses[1].backward()
    first.join(20)
    assert not first.is_alive()


def test_a_forward_that_is_refused_ends_no_other(host_world: World):
    """The forward that the handler struck goes on in its windows."""

    def script(run: Run) -> None:
        x = run.data(2, WIDTH)

        def handler(*_: Any) -> None:
            if run.offloaded:
                inspected = testing.inspect(run.model)
                before = [unit.calls for unit in inspected.units]
                assert sum(before) > 0
                session: Any = inspected.session
                with session.lock, pytest.raises(funicular.RuntimeFailure, match="FN-E106"):
                    run.model(x)
                assert [unit.calls for unit in inspected.units] == before

        handle = run.model.layers[1].norm.register_forward_pre_hook(handler)
        run.train(1)
        handle.remove()
        run.train(1)

    compare(host_world, stack(), script)


def test_what_a_handler_calls_is_imported():
    """Amid the first import of a module another handler would find a part of it."""
    modules = {f"funicular.{name}" for name in ("checkpoint.save_load", "offloading", "optim.adamw", "statistics")}
    code = f"import sys, funicular; funicular.offload; print(sorted({modules} - sys.modules.keys()))"
    with forks.python(code, ready="import torch", stdout=subprocess.PIPE, text=True) as program:
        out, _ = program.communicate(timeout=60)
    assert out == "[]\n"
