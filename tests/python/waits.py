"""What programs do beside a wait: waits made long, in another thread or around a signal handler. Run in processes of their own."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import itertools
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import funicular
from funicular import testing
from models import CUDA, WIDTH, Stack
from twin import SEED, World

#: seconds after which a case counts as one that hangs
LIMIT = 10
DELAY = 60
READS = f"read:delay={DELAY}ms@1x1000000"
#: tiers of parameters and states, and what makes the wait long
WAITS = {
    "page-in": ("nvme", "host", READS),
    "read": ("nvme", "host", READS),
    "update": ("host", "host", f"update:delay={DELAY}ms"),
    "update from disk": ("host", "nvme", READS),
    "states": ("host", "nvme", READS),
    "save": ("host", "nvme", READS),
    "stats": ("host", "host", ""),
    "trace": ("host", "host", ""),
}
NUMBERS = itertools.count()
#: waits beside which the process is left
LEFT = ["page-in", "update", "save", "stats", "trace"]
#: waits that a program has in its main thread, with a signal handler around
HANDLED = ["page-in", "read", "update", "update from disk", "states", "save", "stats"]


class Program:
    """A model that was trained for two steps, and its plain twin."""

    def __init__(self, wait: str, disk: str) -> None:
        params, optimizer, faults = WAITS[wait]
        world = World("cuda" if CUDA else "host", (disk,), params, optimizer, poison=False)
        self.folder = Path(disk) / f"checkpoints-{next(NUMBERS)}"
        self.saved = 0
        self.wait = wait
        torch.manual_seed(SEED)
        self.model: Any = Stack(depth=4)
        self.plain: Any = Stack(depth=4).to(world.torch_device)
        self.plain.load_state_dict(self.model.state_dict())
        log = {"trace": str(Path(disk) / "trace.json")}
        policy = world.policy(self.model, debug={"faults": faults}, log=log)
        self.model = funicular.offload(self.model, policy)
        self.opt = funicular.AdamW(self.model.parameters(), lr=1e-2)
        self.plain_opt = funicular.AdamW(self.plain.parameters(), lr=1e-2)
        self.x = torch.randn(4, WIDTH).to(world.torch_device)
        #: weights of the plain twin by step
        self.history = [self.plain_weights()]
        for _ in range(2):
            self.plain_step()
            self.step()

    def plain_weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone().cpu() for name, p in self.plain.named_parameters()}

    def plain_step(self) -> None:
        self.plain(self.x).square().mean().backward()
        self.plain_opt.step()
        self.plain_opt.zero_grad()
        self.history.append(self.plain_weights())

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.opt.step()
        self.opt.zero_grad()

    def once(self) -> None:
        """Wait."""
        with torch.no_grad():
            if self.wait == "page-in":
                self.model(self.x)
            elif self.wait == "read":
                for p in self.model.parameters():
                    p.sum().item()
        if self.wait.startswith("update"):
            self.step()
        elif self.wait == "states":
            self.opt.state_dict()
        elif self.wait == "save":
            self.save()
        elif self.wait == "stats":
            funicular.stats(self.model)
        elif self.wait == "trace":
            engine = testing.inspect(self.model).engine
            engine.trace(True)
            engine.write_trace(str(self.folder.parent / "trace.json"))

    def until(self, end: float) -> None:
        """Wait once at least, and until that time."""
        self.once()
        while time.monotonic() < end:
            self.once()

    def save(self) -> Path:
        self.saved += 1
        path = self.folder / f"step-{self.saved}"
        funicular.save(self.model, self.opt, path)
        return path

    def check(self, path: Path) -> None:
        """A checkpoint is the state of one step, as a whole."""
        torch.manual_seed(0)
        model: Any = Stack(depth=4)
        opt = funicular.AdamW(model.parameters(), lr=1e-2)
        step = funicular.load(path, model, opt).step
        assert step in (len(self.history) - 1, len(self.history) - 2), step
        same(dict(model.named_parameters()), self.history[step])
        assert {int(opt.state[p]["step"]) for p in model.parameters()} == {step}

    def goes_on(self) -> None:
        """Two more steps with the right bits."""
        for _ in range(2):
            self.plain_step()
            self.step()
        same(dict(self.model.named_parameters()), self.history[-1])


def same(weights: dict[str, Any], right: dict[str, torch.Tensor]) -> None:
    for name, value in right.items():
        assert torch.equal(weights[name].detach().cpu(), value), name


def begin(name: str) -> None:
    """From here on a hang ends the process, with the stacks of all threads."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    print(name, end=" ", flush=True)


def over() -> None:
    faulthandler.cancel_dump_traceback_later()
    print("over", flush=True)


class Beside:
    """A thread that waits again and again, until an error by name ends it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.stopped = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        time.sleep(0.2)

    def run(self) -> None:
        try:
            while not self.stopped:
                self.program.once()
                time.sleep(0.001)  # eight threads that never sleep would leave the main one no turn at the GIL
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        self.stopped = True
        self.thread.join(LIMIT)
        assert not self.thread.is_alive()
        # Of a model that was closed or unwrapped under it.
        assert self.error is None or isinstance(self.error, Exception), self.error


def close(program: Program) -> None:
    testing.inspect(program.model).engine.close()


def unwrap(program: Program) -> None:
    funicular.unwrap(program.model)
    assert all(type(p) is torch.nn.Parameter for p in program.model.parameters())


def fork(program: Program, *, touches: bool) -> None:
    # Its thread would be missing in the child, where an alarm stands in for it.
    faulthandler.cancel_dump_traceback_later()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(LIMIT)
            if touches:
                for touch in (
                    program.step,
                    program.save,
                    lambda: funicular.stats(program.model),
                    program.opt.state_dict,
                ):
                    try:
                        touch()
                    except funicular.RuntimeFailure as error:
                        assert error.code == "FN-E103", error
                    else:
                        raise AssertionError(touch)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    assert os.waitpid(pid, 0)[1] == 0


def fork_that_touches(program: Program) -> None:
    fork(program, touches=True)


def fork_that_does_not(program: Program) -> None:
    fork(program, touches=False)


ENDS: list[Callable[[Program], None]] = [fork_that_touches, fork_that_does_not, unwrap, close]


def beside(wait: str, disk: str) -> None:
    """Each end while another thread waits. Forks leave the model as it is."""
    program = Program(wait, disk)
    for end in ENDS:
        if end is close:
            program = Program(wait, disk)
        begin(f"{end.__name__} beside {wait}:")
        other = Beside(program)
        try:
            end(program)
        except funicular.Error:
            # Steps meanwhile changed what was being taken. Nothing is lost: without them it works.
            assert program.wait.startswith("update")
            other.end()
            end(program)
        other.end()
        over()


def polled(disk: str) -> None:
    """Eight threads ask for figures beside steps, saves and ``unwrap``."""
    program = Program("stats", disk)
    begin("stats from eight threads:")
    others = [Beside(program) for _ in range(8)]
    for _ in range(3):
        program.goes_on()
        program.check(program.save())
    unwrap(program)
    for other in others:
        other.end()
    over()
    begin("and after unwrap:")
    program.goes_on()
    over()


def leave(wait: str, disk: str) -> None:
    """The program ends while a thread waits."""
    program = Program(wait, disk)
    begin(f"exit beside {wait}:")
    Beside(program)
    print("leaves", flush=True)
    sys.exit(3)


def alarmed(action: Callable[[], None], number: int, after: float) -> None:
    """Run an action, with a signal amid it."""
    timer = threading.Timer(after, lambda: os.kill(os.getpid(), number))
    timer.start()
    try:
        action()
    finally:
        timer.join()


def refusals(disk: str) -> None:
    """What a handler must not do amid a page-in is refused by name; the forward goes on, and so does training."""
    program = Program("page-in", disk)
    path = program.save()
    actions: dict[str, Callable[[], Any]] = {
        "forward": lambda: program.model(program.x),
        "step": program.opt.step,
        "load": lambda: funicular.load(path, program.model, program.opt),
        "unwrap": lambda: funicular.unwrap(program.model),
    }
    refused: list[str] = []

    def handler(*_: Any) -> None:
        if not testing.inspect(program.model).busy():
            return  # between two waits
        for name, action in actions.items():
            try:
                action()
            except funicular.RuntimeFailure as error:
                assert error.code == "FN-E106", error
                refused.append(name)

    signal.signal(signal.SIGTERM, handler)
    program.model(program.x).square().mean().backward()
    for after in (0.02, 0.06, 0.1, 0.15):  # amid the page-in of one block and another
        refused.clear()
        while not refused:
            alarmed(program.once, signal.SIGTERM, after)
            after *= 0.9
        assert refused == list(actions)
    program.opt.zero_grad()
    program.goes_on()


def handlers(wait: str, disk: str) -> None:
    """Signal handlers that use the model amid a wait of the main thread: they return, and so does the wait; nothing is lost."""
    program = Program(wait, disk)
    weights: dict[str, torch.Tensor] = {}
    paths: list[Path] = []

    def saves(*_: Any) -> None:
        paths.append(program.save())

    def reads(*_: Any) -> None:
        weights.update({name: value.clone().cpu() for name, value in program.model.state_dict().items()})
        program.opt.state_dict()
        funicular.stats(program.model)

    for handler in (saves, reads):
        for after in (0.1, 0.35):
            begin(f"{handler.__name__} amid {wait}, after {after} s:")
            signal.signal(signal.SIGTERM, handler)
            steps = funicular.stats(program.model).steps
            alarmed(functools.partial(program.until, time.monotonic() + after + 0.1), signal.SIGTERM, after)
            for _ in range(funicular.stats(program.model).steps - steps):
                program.plain_step()
            over()
    begin(f"what was saved amid {wait}:")
    assert len(paths) == 2
    for path in paths:
        step = funicular.load(path, Stack(depth=4)).step
        kept, program.history = program.history, program.history[: step + 1]
        program.check(path)
        program.history = kept
    assert any(all(torch.equal(weights[n], v) for n, v in state.items()) for state in program.history)
    over()
    begin(f"Ctrl-C amid {wait}:")
    with contextlib.suppress(KeyboardInterrupt):
        alarmed(functools.partial(program.until, math.inf), signal.SIGINT, 0.2)
    over()
    begin(f"training after {wait}:")
    program.opt.zero_grad()
    for _ in range(funicular.stats(program.model).steps - len(program.history) + 1):
        program.plain_step()
    program.goes_on()
    over()
