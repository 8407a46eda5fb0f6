"""Ctrl-C at every point at which CPython looks at signals, without chance, in the package and in the parts of torch that call it.

CPython looks at signals when a function begins, after a call, and at a jump back, and nowhere else. A trace function sees every
instruction: it raises before the instruction that follows such a point. Where the two lie under different exception handlers
(the end of a ``try``) the language guarantees that the handler runs, and the point is left out.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import gc
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from funicular import testing
from models import WIDTH, Stack
from twin import SEED, Run, World, match

TORCH = Path(torch.__file__).parent
WATCHED = (
    str(Path(funicular.__file__).parent),
    str(TORCH / "nn/modules/module.py"),
    str(TORCH / "optim/optimizer.py"),
    str(TORCH / "_tensor.py"),
    str(TORCH / "autograd/__init__.py"),
    str(TORCH / "autograd/graph.py"),
)
LOOKS = frozenset({"RESUME", "PRECALL", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"})

#: file, function, line of the point; instruction offset
Point = tuple[str, str, int, int]


@functools.cache
def instructions(code: Any) -> tuple[dict[int, str], dict[int, int]]:
    """Name of every instruction, and its exception handler."""
    names = {i.offset: i.opname for i in dis.get_instructions(code)}
    handler = dict.fromkeys(names, -1)
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        for offset in names:
            if entry.start <= offset < entry.end:
                handler[offset] = entry.target
    return names, handler


def in_finaliser(frame: Any) -> bool:
    """Whether a frame runs for a ``__del__``: Python drops what is raised there."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


class Strike:
    """Raises at the n-th visit of a point; without one, counts the visits of all."""

    def __init__(self, point: Point | None = None, visit: int = 1) -> None:
        self.point, self.left = point, visit
        self.visits: Counter[Point] = Counter()
        self.fired = False

    def __enter__(self) -> Strike:
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code
        if self.point is not None and (code.co_filename, code.co_name) != self.point[:2]:
            return None  # each instruction that is traced takes microseconds
        if self.fired or not code.co_filename.startswith(WATCHED) or in_finaliser(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.visit(frame, -1)
        names, handler = instructions(code)
        before = -1

        def trace(frame: Any, event: str, arg: Any) -> Any:
            nonlocal before
            if event == "opcode" and not self.fired:
                now, last = frame.f_lasti, before
                before = now
                looked = names.get(last) in LOOKS and names.get(now) != "CALL"
                if looked and handler[last] == handler[now]:
                    self.visit(frame, last)
            return trace

        return trace

    def visit(self, frame: Any, offset: int) -> None:
        code = frame.f_code
        point = (code.co_filename, code.co_name, frame.f_lineno, offset)
        self.visits[point] += 1
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                self.fired = True
                sys.settrace(None)
                self.handle()

    def handle(self) -> None:
        """What a signal does there."""
        raise KeyboardInterrupt


def chosen(visits: Counter[Point], stride: int) -> list[Point]:
    """One point in ``stride``, and one of each file in which none of those lies."""
    points = list(visits)
    found = set(points[::stride])
    files = {file for file, *_ in found}
    for point in points:
        if point[0] not in files:
            files.add(point[0])
            found.add(point)
    return [point for point in points if point in found]


def at_every_point(visits: Counter[Point], every: bool, strike: Any, stride: int = 60, first: bool = False) -> None:
    """Call ``strike(point, visit)``, which says if it struck, for the first visit of one point in ``stride``, and of one in each file.

    If ``every``, for all points, and unless ``first`` for a visit in the middle and the last one too.
    """
    struck = tried = 0
    for point in chosen(visits, 1 if every else stride):
        count = visits[point]
        for visit in sorted({1, count // 2 + 1, count} if every and not first else {1}):
            tried += 1
            try:
                struck += strike(point, visit)
            except Exception as error:
                raise AssertionError(f"struck at {point}, visit {visit} of {count}: {error}") from error
    # Some are visited only when a copy or an update happens to be late.
    assert struck > 0.9 * tried - 1


def twins(world: World, dtype: torch.dtype) -> list[Run]:
    runs = []
    for offloaded in (False, True):
        run = Run(world, offloaded)
        runs.append(run)
        run.model = run.wrap(Stack(depth=4).to(dtype))
        run.opt = run.adamw()
        go_on(run, dtype, 2)
    return runs


def go_on(run: Run, dtype: torch.dtype, steps: int = 1) -> None:
    for _ in range(steps):
        run.step(run.model(run.data(4, WIDTH, dtype=dtype)).float().square().mean())
    run.record_weights()
    for name, p in run.model.named_parameters():
        states = run.opt.state[p]
        run.record(f"{name} states", {key: states[key] for key in ("exp_avg", "exp_avg_sq")})
        run.record(f"{name} count", int(states["step"]))


def agree(runs: list[Run], dtype: torch.dtype) -> None:
    """Both go on, with the same bits, and nothing is left behind."""
    home_uses = funicular.stats(runs[1].model).home_uses
    for run in runs:
        run.opt.zero_grad()
        go_on(run, dtype)
    assert funicular.stats(runs[1].model).home_uses == home_uses, "frames are still held"
    match(runs[0].notes, runs[1].notes)
    for run in runs:
        run.notes.clear()
    assert facts.saved_tensor_hooks() == 0, "hooks are left"
    for unit in testing.inspect(runs[1].model).units:
        assert unit.calls == 0
        assert not unit.held, f"{unit.name} is held"
        assert not unit.moving


def interrupted(strike: Strike, action: Any) -> bool:
    heard = False
    try:
        with strike:
            action()
    except (KeyboardInterrupt, SystemError):  # SystemError: through a C++ frame of torch
        heard = True
    finally:
        torch.set_grad_enabled(True)  # torch's own context managers may be struck too
    assert heard == strike.fired, "swallowed"
    assert facts.saved_tensor_hooks() == 0, "hooks are left at once"
    return strike.fired


def forward_and_backward(world: World, every: bool) -> int:
    """The step that follows is exact, wherever forward or backward was struck."""
    runs = twins(world, torch.float32)
    paged = runs[1]
    x = paged.data(4, WIDTH)
    runs[0].data(4, WIDTH)

    def action() -> None:
        paged.model(x).square().mean().backward()

    def strike(point: Point, visit: int) -> bool:
        struck = interrupted(Strike(point, visit), action)
        agree(runs, torch.float32)
        return struck

    counter = Strike()
    interrupted(counter, action)
    agree(runs, torch.float32)
    at_every_point(counter.visits, every, strike)
    return len(counter.visits)


def step_and_zero_grad(world: World, every: bool) -> int:
    """The step was taken as a whole, or not at all; from there training is exact."""
    dtype = torch.bfloat16
    runs = twins(world, dtype)
    plain, paged = runs

    def gradients() -> None:
        for run in runs:
            run.opt.zero_grad()
            run.model(run.data(4, WIDTH, dtype=dtype)).float().square().mean().backward()

    def action() -> None:
        paged.opt.step()
        paged.opt.zero_grad()

    def strike(point: Point, visit: int) -> bool:
        gradients()
        # Memory that other tensors look at has to be kept up to date as well.
        watched = [p.detach() for p in list(paged.model.parameters())[:3]]
        paged.opt.state[paged.model.inp.weight]["exp_avg"].mul_(0.5)
        plain.opt.state[plain.model.inp.weight]["exp_avg"].mul_(0.5)
        before = count(paged)
        struck = interrupted(Strike(point, visit), action)
        if count(paged) > before:
            plain.opt.step()
        agree(runs, dtype)
        assert torch.equal(watched[2], list(plain.model.parameters())[2]), "an alias was left behind"
        return struck

    gradients()
    counter = Strike()
    interrupted(counter, action)
    plain.opt.step()
    agree(runs, dtype)
    at_every_point(counter.visits, every, strike)
    return len(counter.visits)


def reads_and_edits(world: World, every: bool) -> int:
    """Every edit is made or not, wherever it was struck; what is trained on is what can be read."""
    # Poison would refill every frame from its home: an edit that the frames lack must not be hidden.
    runs = twins(dataclasses.replace(world, poison=False), torch.float32)
    plain, paged = runs
    x = paged.data(4, WIDTH)
    plain.data(4, WIDTH)
    inside = paged.model.layers[2].up.weight

    def edit(*_: Any) -> None:
        with torch.no_grad():
            inside.add_(1)

    def action() -> None:
        model = paged.model
        sums = [p.detach().sum().item() for p in model.parameters()]
        assert all(s == s for s in sums)
        with torch.no_grad():
            model.layers[0].up.weight.add_(1)
            torch._foreach_add_([model.layers[1].up.weight, model.out.bias], 1.0)
        model.layers[3].up.weight.data = model.layers[3].up.weight.detach() + 1
        model.inp.weight.data.add_(1)
        torch.nn.functional.linear(x, model.inp.weight).square().mean().backward()
        handle = model.layers[2].register_forward_hook(edit)
        try:
            with torch.no_grad():
                model(x)
        finally:
            handle.remove()

    def strike(point: Point, visit: int) -> bool:
        before = [p.detach().clone() for p in paged.model.parameters()]
        struck = interrupted(Strike(point, visit), action)
        seen = read(paged)
        again = [p.detach().clone() for p in paged.model.parameters()]
        for old, new, last, mine in zip(before, seen, again, plain.model.parameters()):
            assert torch.equal(new, old) or torch.equal(new, old + 1), "half an edit"
            assert torch.equal(new, last), "an edit was lost"
            with torch.no_grad():
                mine.copy_(new)
        agree(runs, torch.float32)
        return struck

    counter = Strike()
    interrupted(counter, action)
    with torch.no_grad():
        for p, mine in zip(paged.model.parameters(), plain.model.parameters()):
            mine.copy_(p)
    agree(runs, torch.float32)
    at_every_point(counter.visits, every, strike)
    return len(counter.visits)


def read(run: Run) -> list[torch.Tensor]:
    """Copies of all weights; those that are said to be in memory are read first."""
    params = list(run.model.parameters())
    found: dict[int, torch.Tensor] = {}
    for p in sorted(params, key=lambda p: not testing.inspect_parameter(p).unit.in_memory):
        found[id(p)] = p.detach().clone()
    return [found[id(p)] for p in params]


def reads(world: World, every: bool) -> int:
    """After a read that was struck, weights are those of the last step: nothing that was read before it is taken for them."""
    runs = twins(world, torch.float32)
    paged = runs[1]

    def action() -> None:
        for p in paged.model.parameters():
            assert p.detach().isfinite().all()
            assert paged.opt.state[p]["exp_avg"].isfinite().all()
        paged.opt.state_dict()
        paged.model.state_dict()

    def strike(point: Point, visit: int) -> bool:
        before = read(paged)
        struck = interrupted(Strike(point, visit), action)
        if visit > 1:
            assert all(torch.equal(a, b) for a, b in zip(before, read(paged)))
        agree(runs, torch.float32)
        return struck

    counter = Strike()
    interrupted(counter, action)
    agree(runs, torch.float32)
    at_every_point(counter.visits, every, strike)
    return len(counter.visits)


def offload_and_unwrap(world: World, every: bool) -> int:
    """Struck in the midst, a model is offloaded as a whole or ordinary as a whole, and nothing of it is lost."""
    model = Stack(depth=3).to(world.torch_device)
    opt = funicular.AdamW(model.parameters())
    x = torch.ones(4, WIDTH, device=world.torch_device)
    model(x).square().mean().backward()
    opt.step()
    params = list(model.parameters())
    # On the device of the parameter, both; and the moments, which move in and out with it.
    kept = [(p.detach().clone(), p.grad.clone(), opt.state[p]["exp_avg"].clone()) for p in params]

    states = opt.state_dict()

    def ready() -> None:
        funicular.offload(model, world.policy(model))
        opt.load_state_dict(states)  # the moments move in

    def action() -> None:
        funicular.unwrap(model)
        funicular.offload(model, world.policy(model))

    def strike(point: Point, visit: int) -> bool:
        ready()
        struck = interrupted(Strike(point, visit), action)
        if testing.is_offloaded(model):
            model(x).square().mean()
            funicular.unwrap(model)
        for p, (weight, grad, moment) in zip(params, kept):
            assert type(p) is torch.nn.Parameter
            assert torch.equal(p.detach(), weight)
            assert torch.equal(p.grad, grad)
            assert torch.equal(opt.state[p]["exp_avg"], moment)
        model(x).square().mean().backward()  # nothing of the runtime hangs on it
        for p, (_, grad, _) in zip(params, kept):
            p.grad = grad.clone()
        gc.collect()
        assert not facts.files(world.paths[0])
        assert facts.saved_tensor_hooks() == 0
        return struck

    ready()
    counter = Strike()
    interrupted(counter, action)
    funicular.unwrap(model)
    # Each takes two engines.
    at_every_point(counter.visits, every, strike, stride=100, first=True)
    return len(counter.visits)


def count(run: Run) -> int:
    counts = {int(run.opt.state[p]["step"]) for p in run.model.parameters()}
    assert len(counts) == 1, f"some were stepped, some not: {counts}"
    return counts.pop()


ENDLESS = """
import atexit
from funicular import testing
atexit.register(lambda: print("closed", flush=True))
atexit.register(testing.close_all)  # before that; again later, for nothing
where = {where!r}
model = Stack(depth=200 if where == "offload" else 12)
def forever(action):
    print("go", flush=True)
    while True: action()
if where == "offload":
    forever(lambda: funicular.unwrap(funicular.offload(model, world.policy(model))))
funicular.offload(model, world.policy(model))
opt = funicular.AdamW(model.parameters())
x = torch.ones(4, WIDTH).to(world.torch_device)
loss = model(x).sum()
if where == "forward": forever(lambda: model(x))
if where == "backward": forever(lambda: loss.backward(retain_graph=True))
forever(opt.step)
"""


def process_ends(where: str, placement: str, disk: str, after: float, limit: float = 200) -> float:
    """Ctrl-C that no handler catches, ``after`` seconds of a loop: seconds until all is closed. A hang is an error with its stack."""
    process = children.start(ENDLESS.format(where=where), disk, PLACEMENTS[placement], DEVICE)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    if not select.select([process.stdout], [], [], limit)[0]:
        process.kill()
        raise AssertionError(f"not closed after {limit} s\n{process.communicate()[1]}")
    assert process.stdout.readline() == "closed\n"
    seconds = time.monotonic() - started
    # What comes after that is the interpreter's and torch's own end, seconds on a busy machine.
    status, _, err = children.finish(process)
    assert status in (1, -signal.SIGINT), err
    assert "KeyboardInterrupt" in err
    assert "panicked" not in err
    assert "Exception ignored" not in err, err
    assert not facts.files(disk)
    return seconds


def real_signals(world: World, rounds: int) -> int:
    """Alarms at random moments of whole steps, Ctrl-C as it really comes: in the core, in torch, between any two instructions."""

    def fire(*_: Any) -> None:
        nonlocal fired
        fired = True
        raise KeyboardInterrupt

    dtype = torch.bfloat16
    runs = twins(world, dtype)
    plain, paged = runs
    chance = random.Random(SEED)
    signal.signal(signal.SIGALRM, fire)
    struck = 0
    for _ in range(rounds):
        x = paged.data(4, WIDTH, dtype=dtype)
        plain.data(4, WIDTH, dtype=dtype)
        before = count(paged)
        fired = heard = False
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 0.02))
            for _ in range(20):
                paged.model(x).float().square().mean().backward()
                paged.opt.step()
                paged.opt.zero_grad()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except (KeyboardInterrupt, SystemError):
            struck += 1
            heard = True
        finally:
            torch.set_grad_enabled(True)
        assert heard == fired, "swallowed"
        assert facts.saved_tensor_hooks() == 0, "hooks are left at once"
        for _ in range(count(paged) - before):
            plain.model(x).float().square().mean().backward()
            plain.opt.step()
            plain.opt.zero_grad()
        agree(runs, dtype)
    return struck
