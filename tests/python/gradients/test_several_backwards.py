"""Backwards of several threads that add to the gradients of one model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from funicular import testing
from models import CUDA, stack
from mutations import wrap
from others import Other, hooked, loss, weight
from twin import Run, World, compare

pytestmark = [
    pytest.mark.gradients,
    pytest.mark.skipif(CUDA, reason="all backwards of a GPU run in one thread, which a hook would keep"),
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("sums", ["", "sums:up"])
@pytest.mark.parametrize("before", [0, 1], ids=["first", "sum"])
def test_overtaken_before_it_adds(world: World, before: int, sums: str) -> None:
    """A backward is about to add to a gradient while another one goes from its beginning to its end."""
    if sums and world.gradients == "nvme":
        pytest.skip("gradients on disk are lifted, not brought up")

    def script(run: Run) -> None:
        run.train(1)
        for _ in range(2):
            for _ in range(before):
                loss(run).backward()
            other = Other(loss(run).backward)
            with hooked(weight(run), other.stop_here):
                other.start_and_wait()
                loss(run).backward()
                other.end()
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad()
        run.train(2)

    compare(world, stack(), script, debug={"faults": sums})


def test_adds_to_what_is_on_its_way_down(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other backward adds to the tensor that this one has just sent to its place."""
    others: list[Other] = []

    def beside(original: Callable[..., None]) -> Callable[..., None]:
        def send(landing: Any, ref: Any, *args: Any) -> None:
            original(landing, ref, *args)
            if others and "layers.3.up.weight" in ref.name and not others[0].thread.ident:
                others[0].try_to_end()

        return send

    wrap(monkeypatch, "funicular.gradients.arrival.Landing.send", beside)

    def script(run: Run) -> None:
        run.train(1)
        of_one = weight(run).sum()
        others[:] = [Other(of_one.backward)]
        loss(run).backward()
        if not run.offloaded:
            others[0].start()
        others.pop().end()
        run.record_grads()
        run.train(2)

    compare(world, stack(), script)


def test_a_backward_that_fails_beside_another(world: World) -> None:
    """What a failed backward was at is brought down by later ones."""

    def script(run: Run) -> None:
        def fail() -> None:
            with pytest.raises(ZeroDivisionError):
                loss(run).backward()

        def stop_and_fail(*_: Any) -> None:
            other.stop_here()
            if threading.current_thread() is other.thread:
                raise ZeroDivisionError

        run.train(1)
        other = Other(fail)
        with hooked(weight(run), stop_and_fail):
            other.start_and_wait()
            loss(run).backward()
            other.end()
        run.train(1)
        loss(run).backward()
        if run.offloaded:
            assert type(weight(run).grad) is not torch.Tensor, "it has not come to its place"
        run.opt.step()

    compare(world, stack(), script)


def test_at_the_same_time(world: World) -> None:
    """Four steps of two backwards each, as the threads happen to meet."""

    def script(run: Run) -> None:
        for _ in range(4):
            others = [Other(loss(run).backward) for _ in range(2)]
            for other in others:
                other.start()
            for other in others:
                other.end()
            run.record_grads()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2)
            run.opt.step()
            run.opt.zero_grad()

    compare(world, stack(), script)


def test_added_to_while_others_need_the_memory(nvme_gradients: World) -> None:
    """Gradients on disk that are in memory, and are about to be added to there, stay there while others are read."""

    def script(run: Run) -> None:
        run.train(1)
        loss(run).backward()
        run.record("before", weight(run).grad)  # from here on it is in memory
        other = Other(loss(run).backward)
        with hooked(weight(run), other.stop_here):
            other.start_and_wait()
            # The other backward has passed those of later blocks.
            for block in (0, 1, 2):
                run.record("beside", [p.grad for p in run.model.layers[block].parameters()])
            if run.offloaded:  # as for anything that finds no room
                session: Any = testing.inspect(run.model).session
                session.drop_unused()
            other.end()
        run.record_grads()
        run.train(2)

    compare(nvme_gradients, stack(), script)


@pytest.fixture
def nvme_gradients(disk: str) -> World:
    return World("host", (disk,), "host", "nvme", gradients="nvme")
