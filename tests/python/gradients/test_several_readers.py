"""Other threads that look at gradients and states, or clear gradients, amid what the training thread does with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import funicular
from funicular import testing
from models import CUDA, stack
from mutations import wrap
from others import LONG, Other, clipped_step, look, loss, weight
from twin import Run, World, compare

pytestmark = [
    pytest.mark.gradients,
    pytest.mark.skipif(CUDA, reason="all backwards of a GPU run in one thread, which a hook would keep"),
]


@pytest.mark.parametrize("when", ["taken", "forgotten"])
def test_two_look_at_a_clipped_gradient(world: World, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is multiplied once, and both see it multiplied."""
    beside: list[Callable[[], None]] = []

    def amid(original: Callable[..., None]) -> Callable[..., None]:
        def forget(ref: Any) -> None:
            pending = ref.factor is not None
            if when == "forgotten":
                original(ref)
            if beside and pending:
                beside.pop()()
            if when == "taken":
                original(ref)

        return forget

    wrap(monkeypatch, "funicular.units.param.PagedParam.forget_norm", amid)

    def script(run: Run) -> None:
        clipped_step(run)
        for _ in range(2):
            loss(run).backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
            seen: list[torch.Tensor] = []
            here: list[torch.Tensor] = []
            other = Other(lambda seen=seen: look(weight(run), seen))
            if run.offloaded:
                beside.append(other.try_to_end)
            else:
                other.start()
            look(weight(run), here)
            assert not beside
            other.end()
            run.record("seen", [*here, *seen])
            run.opt.step()
            run.opt.zero_grad()

    compare(world, stack(), script)


def test_looks_as_a_step_ends(world: World) -> None:
    """A reader that waited for the step sees the clipped gradient: only handlers amid the step are refused."""

    class Lock:
        """The session's lock; as it is let go, the other thread looks."""

        def __init__(self, lock: Any) -> None:
            self.lock, self.depth, self.main = lock, 0, threading.get_ident()

        def __enter__(self) -> None:
            self.lock.acquire()
            self.depth += 1

        def __exit__(self, *_: object) -> None:
            self.depth -= 1
            let_go = self.depth == 0 and threading.get_ident() == self.main
            self.lock.release()
            if let_go and self.action is not None:
                action, self.action = self.action, None
                action()

        action: Callable[[], None] | None = None

    def script(run: Run) -> None:
        clipped_step(run)
        loss(run).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        seen: list[torch.Tensor] = []
        other = Other(lambda: look(weight(run), seen))
        if not run.offloaded:
            run.opt.step()
            other.start()
        else:
            session: Any = testing.inspect(run.model).session
            real = session.lock
            session.lock = lock = Lock(real)
            steps = funicular.stats(run.model).steps

            def when_stepped() -> None:
                if funicular.stats(run.model).steps > steps:
                    other.try_to_end()
                else:
                    lock.action = when_stepped

            lock.action = when_stepped
            run.opt.step()
            session.lock = real
        other.end()
        run.record("seen", seen)
        run.opt.zero_grad()
        run.train(1)

    compare(world, stack(), script)


@pytest.mark.parametrize("foreach", [True, False])
def test_looks_amid_clipping(world: World, foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader makes clipping forget what it knew of a gradient while that is asked about."""
    beside: list[Callable[[], None]] = []

    def amid(original: Any) -> Any:
        def factor(ref: Any) -> Any:
            if beside and threading.current_thread() is threading.main_thread():
                beside.pop()()
            return original.__get__(ref)

        return property(factor, original.__set__)

    wrap(monkeypatch, "funicular.units.param.PagedParam.factor", amid)

    def script(run: Run) -> None:
        clipped_step(run, foreach=foreach)
        loss(run).backward()
        seen: list[torch.Tensor] = []
        others = [Other(lambda p=p: look(p, seen)) for p in run.model.parameters()]

        def all_look() -> None:
            for other in others:
                other.start()
            others[-1].thread.join(0.3)

        beside[:] = [all_look] if run.offloaded else []
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3, foreach=foreach))
        if not run.offloaded:
            all_look()
        assert not beside
        for other in others:
            other.end()
        run.opt.step()
        run.opt.zero_grad()
        run.train(1)

    compare(world, stack(), script)


def test_cleared_on_its_way_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread has cleared does not come back when its copy is over."""
    clears: list[Callable[[], None]] = []

    def beside(original: Callable[..., None]) -> Callable[..., None]:
        def send(landing: Any, ref: Any, *args: Any) -> None:
            original(landing, ref, *args)
            while clears and "layers.3.up.weight" in ref.name:
                clears.pop()()

        return send

    wrap(monkeypatch, "funicular.gradients.arrival.Landing.send", beside)

    def script(run: Run) -> None:
        def clear() -> None:
            weight(run).grad = None

        run.train(1)
        other = Other(clear)
        clears[:] = [other.try_to_end] if run.offloaded else []
        loss(run).backward()
        assert not clears
        if not run.offloaded:
            other.start()
        other.end()
        run.record_grads()
        run.opt.step()
        run.train(2)

    compare(world, stack(), script)


@pytest.mark.parametrize("max_norm", [1e-3, None])
def test_cleared_amid_a_step(world: World, max_norm: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread, after the step has looked which parameters have gradients: it takes those that it has seen."""
    clears: list[Callable[[], None]] = []

    def beside(original: Callable[..., None]) -> Callable[..., None]:
        def check(*args: Any) -> None:
            while clears:
                clears.pop()()
            original(*args)

        return check

    wrap(monkeypatch, "funicular.optim.adamw.check_replaced", beside)

    def script(run: Run) -> None:
        clipped_step(run)
        loss(run).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
        other = run.model.layers[1].up.weight
        other.grad = other.grad.clone() * 2  # one that is not in its place
        thread = Other(run.opt.zero_grad)
        clears[:] = [thread.try_to_end] if run.offloaded else []
        run.opt.step()
        assert not clears
        if not run.offloaded:
            thread.start()
        thread.end()
        run.record_grads()
        run.train(2)

    compare(world, stack(), script)


@pytest.mark.parametrize("brought_by", ["backward", "step"])
def test_the_next_one_comes_while_it_is_read(world: World, brought_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread is amid an operation on a gradient that is cleared meanwhile: it reads the old one, as in plain PyTorch."""
    readers: list[Other] = []

    def stopped(original: Callable[..., None]) -> Callable[..., None]:
        def adopt(*args: Any) -> None:
            for reader in readers:
                reader.stop_here()
            original(*args)

        return adopt

    wrap(monkeypatch, "funicular.guard.classes._adopt", stopped)

    def script(run: Run) -> None:
        def read() -> None:
            grad = weight(run).grad
            assert grad is not None
            kept.append(grad.detach())

        run.train(1)
        loss(run).backward()
        kept: list[torch.Tensor] = []
        reader = Other(read)
        readers[:] = [reader]
        if run.offloaded:
            reader.start_and_wait()
        else:
            reader.start()
            reader.end()
        run.opt.zero_grad()
        loss(run).backward()
        if brought_by == "backward":
            reader.end()
        else:
            threading.Timer(0.2, reader.go_on.set).start()
        run.opt.step()
        reader.end()
        run.record("kept", kept)
        run.opt.zero_grad()
        run.train(2)
        run.record("still kept", kept)

    compare(world, stack(), script)


def test_a_state_is_read_amid_a_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread has read it, and the step comes before it has taken note of that: later readers see the stepped one."""
    readers: list[Other] = []

    def slow(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any) -> Any:
            found = original(*args)
            for reader in readers:
                if threading.current_thread() is reader.thread:
                    reader.there.set()
                    reader.go_on.wait(0.3)  # the step is over, or waits for this thread
            return found

        return read

    wrap(monkeypatch, "funicular.optim.state_places.StatePlaces._read", slow)

    def script(run: Run) -> None:
        run.train(1)
        loss(run).backward()
        seen: list[torch.Tensor] = []
        reader = Other(lambda: seen.append(run.opt.state[weight(run)]["exp_avg"]))
        readers[:] = [reader]
        reader.start()
        if run.offloaded:
            assert reader.there.wait(LONG)
        run.opt.step()
        reader.end()
        run.record("seen", seen)
        run.record("state", run.opt.state[weight(run)]["exp_avg"])
        run.opt.zero_grad()
        run.train(1)
        run.record("state", run.opt.state[weight(run)]["exp_avg"])

    compare(world, stack(), script)
