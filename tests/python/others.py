"""Other threads of a test, which stop on their way where they are told to, and what they do with gradients."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from models import WIDTH
from twin import Run

#: seconds after which a test counts as one that hangs
LONG = 60


class Other:
    """Another thread, which does one thing and stops on its way where it is told to."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.there, self.go_on = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(action,))

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:
            self.error = error

    def stop_here(self, *_: Any) -> None:
        """Wait to be sent on, in this thread and the first time that it comes here."""
        if threading.current_thread() is self.thread and not self.there.is_set():
            self.there.set()
            assert self.go_on.wait(LONG)

    def start(self) -> None:
        self.thread.start()

    def start_and_wait(self) -> None:
        self.start()
        assert self.there.wait(LONG), self.error

    def try_to_end(self) -> None:
        """Start it, and give it time: it ends, or waits for the thread that calls this."""
        self.start()
        self.thread.join(0.3)

    def end(self) -> None:
        self.go_on.set()
        self.thread.join(LONG)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error


def loss(run: Run) -> torch.Tensor:
    return run.model(run.data(4, WIDTH)).square().mean()


@contextlib.contextmanager
def hooked(p: torch.Tensor, hook: Callable[..., None]) -> Iterator[None]:
    handle = p.register_hook(hook)
    yield
    handle.remove()


def weight(run: Run) -> torch.nn.Parameter:
    return run.model.layers[3].up.weight


def clipped_step(run: Run, **options: Any) -> None:
    """After it norms are taken as gradients come."""
    loss(run).backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3, **options)
    run.opt.step()
    run.opt.zero_grad()


def look(p: torch.Tensor, seen: list[torch.Tensor]) -> None:
    assert p.grad is not None
    seen.append(p.grad.clone())
