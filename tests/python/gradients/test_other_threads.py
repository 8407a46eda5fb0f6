"""Gradients of a training thread, while other threads differentiate: ``torch.autograd.grad`` runs hooks of parameters, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import CUDA, WIDTH, stack
from mutations import wrap
from twin import Run, World, case, compare

pytestmark = pytest.mark.gradients


def backward(run: Run) -> None:
    run.model(run.data(4, WIDTH)).square().mean().backward()


def of_each(run: Run) -> list[torch.Tensor]:
    return [torch.autograd.grad(p.sum(), p)[0] for p in run.model.parameters()]


def of_all(run: Run) -> tuple[torch.Tensor, ...]:
    x = torch.ones(4, WIDTH, device=run.device)
    return torch.autograd.grad(run.model(x).square().mean(), list(run.model.parameters()))


@case(stack(), debug={"faults": "sums:up"})
def test_differentiating_leaves_gradients_alone(run: Run) -> None:
    """Each stays the tensor that it is: before the backward, between two, before the step and after it."""

    def differentiate() -> None:
        before = [id(p.grad) for p in run.model.parameters()]
        run.record("of each", of_each(run))
        run.record("of all", of_all(run))
        run.record("the same", [id(p.grad) for p in run.model.parameters()] == before)

    for _ in range(2):
        for _ in range(2):
            differentiate()
            backward(run)
        differentiate()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2)
        differentiate()
        run.opt.step()
        differentiate()
        run.opt.zero_grad()
    # Backwards of other kinds add, and of some weights alone.
    backward(run)
    weights = [run.model.layers[i].up.weight for i in (1, 3)]
    run.model(run.data(4, WIDTH)).square().mean().backward(inputs=weights)
    (penalty,) = torch.autograd.grad(weights[0].square().sum(), weights[0], create_graph=True)
    penalty.square().sum().backward()


def test_cleared_while_another_thread_differentiates(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other thread is at for one gradient does not bring it back after it was cleared."""
    inside, go_on = threading.Event(), threading.Event()

    def held(original: Callable[..., bool]) -> Callable[..., bool]:
        def lift(*args: Any) -> bool:
            lifted = original(*args)
            inside.set()
            assert go_on.wait(60)
            return lifted

        return lift

    wrap(monkeypatch, "funicular.gradients.paged.lift_gradient", held)

    def script(run: Run) -> None:
        inside.clear()
        go_on.clear()
        run.train(1)
        p = run.model.layers[2].up.weight
        loss = p.sum()
        backward(run)
        run.opt.step()
        other = threading.Thread(target=torch.autograd.grad, args=(loss, p))
        other.start()
        while not inside.is_set() and other.is_alive():
            time.sleep(0.001)
        run.opt.zero_grad()
        go_on.set()
        other.join()
        run.train(2)

    compare(world, stack(), script)


def test_cleared_amid_a_sum(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal handler, or by another thread, while autograd is about to add to it: what comes is the gradient."""
    amid: list[Callable[[], None]] = []

    def clearing(original: Callable[..., bool]) -> Callable[..., bool]:
        def lift(*args: Any) -> bool:
            lifted = original(*args)
            while amid:
                amid.pop()()
            return lifted

        return lift

    wrap(monkeypatch, "funicular.gradients.paged.lift_gradient", clearing)

    def script(run: Run) -> None:
        def clear(*_: Any) -> None:
            last.grad = None

        run.train(1)
        backward(run)
        last = run.model.out.bias
        if run.offloaded and world.gradients == "nvme":
            amid.append(clear)
        else:
            handle = last.register_hook(clear)
        run.train(1)
        assert not amid
        if not run.offloaded or world.gradients != "nvme":
            handle.remove()
        run.train(1)

    compare(world, stack(), script)


@pytest.mark.skipif(CUDA, reason="the hook would keep the thread that the other backward needs")
def test_a_backward_is_over_at_its_own_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on their way are not hurried, and what is gathered is not written, because another thread has differentiated."""
    ends: list[int] = []

    def counted(original: Callable[..., None]) -> Callable[..., None]:
        def ended(*arguments: Any) -> None:
            ends.append(threading.get_ident())
            original(*arguments)

        return ended

    wrap(monkeypatch, "funicular.gradients.backward.Gradients.backward_ended", counted)

    def script(run: Run) -> None:
        def beside(grad: torch.Tensor) -> None:
            if threading.get_ident() in others:
                return  # this hook is run for the other thread, too
            other = threading.Thread(target=work, args=(run,))
            other.start()
            other.join()

        def work(run: Run) -> None:
            others.add(threading.get_ident())
            of_all(run)
            others.clear()

        others: set[int] = set()
        handle = run.model.layers[3].up.weight.register_hook(beside)
        run.train(3, look=False)
        handle.remove()

    compare(world, stack(), script)
    assert set(ends) == {threading.get_ident()}
    assert len(ends) == 3


def test_nothing_is_brought_up_that_is_not_added_to(host_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []

    def counted(original: Callable[..., int]) -> Callable[..., int]:
        def up(engine: Any, unit: int, *args: Any) -> int:
            brought.append(unit)
            return original(engine, unit, *args)

        return up

    wrap(monkeypatch, "funicular.gradients.sums.gradient_up", counted)

    def script(run: Run) -> None:
        run.train(1)
        backward(run)
        run.record("of all", of_all(run))
        assert not brought
        backward(run)
        assert bool(brought) == run.offloaded

    compare(host_world, stack(), script, debug={"faults": "sums:up"})


def test_a_step_is_noted_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the thread that takes it: another one, which looks at a gradient meanwhile, waits for it."""
    noted: list[int] = []
    others: list[threading.Thread] = []

    def script(run: Run) -> None:
        def look() -> None:
            with torch.no_grad():
                run.model.out.weight.grad.sum()

        def beside(original: Callable[..., None]) -> Callable[..., None]:
            def stepped(*args: Any) -> None:
                noted.append(threading.get_ident())
                if len(noted) == 1:
                    others.append(threading.Thread(target=look))
                    others[0].start()
                    others[0].join(0.3)  # it notes the step, or it waits for this thread
                original(*args)

            return stepped

        run.train(1)
        backward(run)
        with monkeypatch.context() as patch:
            wrap(patch, "funicular.windows.session.Session.stepped", beside)
            run.opt.step()
        for other in others:
            other.join()
        run.opt.zero_grad()
        run.train(2)

    compare(world, stack(), script)
    assert noted == [threading.get_ident()]
