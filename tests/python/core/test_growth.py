"""Optimizer states that move into free memory of the compute device, and out of it again: the same bits at any time.

The host device has no memory of its own: the tests make up how much there is, and how much others have of it.
"""

import contextlib
import copy
import logging
import random
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import facts
import funicular
from funicular import testing
from models import CUDA, WIDTH, stack
from twin import SEED, Run, compare

#: a second set of states, for updates ahead
SPARE = {"spare": "32MiB"}
pytestmark = pytest.mark.skipif(
    CUDA, reason="a GPU tells how much of its memory is free: tests/python/core/test_growth_gpu.py"
)

CAPACITY = 8 << 20
#: others leave the margin and room for all states, for some, or less than the margin
ROOMY, TIGHT, SHORT = 1 << 20, CAPACITY - (CAPACITY // 4) - (48 << 10), CAPACITY - (64 << 10)
AUTO = {"budget": {"hbm": None}}


def others(run: Run, size: int) -> None:
    """Let the program and others have so much of the device's memory."""
    if run.offloaded:
        testing.inspect(run.model).make_memory_up(CAPACITY, size)


def asked(run: Run) -> None:
    """Do what torch's allocator does when it finds no memory."""
    if run.offloaded:
        testing.inspect(run.model).give_memory_back()


def weather(run: Run, step: int) -> None:
    """Others take memory and leave it; states move up in between, and down."""
    others(run, ROOMY if step < 14 else SHORT if step < 16 else TIGHT if step < 40 else ROOMY)


def loss_of(run: Run, dtype: torch.dtype = torch.float32):
    return run.model(run.data(4, WIDTH, dtype=dtype)).float().square().mean()


def plain_steps(run: Run) -> None:
    for step in range(50):
        weather(run, step)
        run.step(loss_of(run), look=False)
        if step == 44:
            asked(run)
    run.record("state", [run.opt.state[p]["exp_avg"] for p in run.model.parameters()])


def clipping(run: Run) -> None:
    for step in range(44):
        weather(run, step)
        loss_of(run).backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3 if step % 3 else 1e3))
        if step == 38:
            asked(run)
        run.opt.step()
        run.opt.zero_grad()


def accumulation(run: Run) -> None:
    """Memory is asked for amid backward, and between backward and step."""
    for step in range(38):
        weather(run, step)
        for backward in range(2):
            loss_of(run).backward()
            if step == 33 + backward:
                asked(run)
        run.opt.step()
        run.opt.zero_grad()


def looks_and_edits(run: Run) -> None:
    """States are read, written, and loaded while they are up."""
    saved = None
    for step in range(30):
        weather(run, step)
        loss_of(run).backward()
        weight = run.model.layers[2].up.weight
        if step in (8, 22):
            run.record("state", run.opt.state[weight]["exp_avg_sq"])
        elif step in (9, 24):
            run.opt.state[weight]["exp_avg"].mul_(0.5)
        elif step == 10:
            with torch.no_grad():
                run.model.layers[3].up.weight.mul_(1.5)
        elif step == 11:
            saved = copy.deepcopy(run.opt.state_dict())
        run.opt.step()
        run.opt.zero_grad()
        if step == 12:
            run.opt.load_state_dict(saved)
    run.record("states", [run.opt.state[p]["exp_avg_sq"] for p in run.model.parameters()])


def up(model: nn.Module) -> int:
    return funicular.stats(model).grown.taken


@pytest.mark.parametrize("sections", [{}, {"optimizer": SPARE}], ids=["one set", "two sets"])
@pytest.mark.parametrize("script", [plain_steps, clipping, accumulation, looks_and_edits], ids=lambda s: s.__name__)
def test_same_bits(host_world, script, sections):
    run = compare(host_world, stack(), script, **AUTO, **sections)
    grown = funicular.stats(run.model).grown
    assert {"room", "short"} <= {move.why for move in grown.moves}
    assert grown.up > grown.down or not grown.taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(host_world, dtype):
    def script(run: Run) -> None:
        for step in range(24):
            weather(run, step)
            loss_of(run, dtype).backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2 if step % 3 == 2 else 1e9))
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, lambda: stack()().to(dtype), script, **AUTO, optimizer=SPARE)


@pytest.mark.parametrize("where", ["gpu", "cpu"])
def test_updates_by_lanes_and_by_the_processor(host_world, where):
    compare(host_world, stack(), accumulation, **AUTO, optimizer={"where": where})


def grown(world, steps: int = 8, **sections) -> tuple[Run, Run]:
    """A plain and an offloaded run of some steps, the states of the second one up."""
    runs = tuple(Run(world, offloaded) for offloaded in (False, True))
    for run in runs:
        torch.manual_seed(SEED)
        run.model = run.wrap(stack()(), **AUTO, **sections)
        run.opt = run.adamw()
    others(runs[1], ROOMY)
    both(runs, steps)
    facts.eventually(lambda: up(runs[1].model) > 0)
    return runs


def both(runs, steps: int) -> None:
    for run in runs:
        for _ in range(steps):
            run.step(loss_of(run), look=False)


def agree(runs) -> None:
    plain, paged = runs
    for (name, p), q in zip(plain.model.named_parameters(), paged.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(plain.opt.state[p][key], paged.opt.state[q][key].to(p.device)), (name, key)


def test_a_fixed_budget_stays_fixed(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(stack()())
    run.opt = run.adamw()
    others(run, ROOMY)
    run.train(8)
    grown = funicular.stats(run.model).grown
    assert (grown.up, grown.moves) == (0, ())


def test_it_looks_before_it_takes(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), **AUTO)
    run.opt = run.adamw()
    others(run, ROOMY)
    for _ in range(2):
        run.step(loss_of(run), look=False)
        assert funicular.stats(run.model).grown.up == 0
    run.train(4)
    facts.eventually(lambda: up(run.model) > 0)
    assert min(move.step for move in funicular.stats(run.model).grown.moves) >= 2


def test_no_more_than_is_left_but_the_margin(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), **AUTO)
    run.opt = run.adamw()
    others(run, TIGHT)
    run.train(10)
    facts.eventually(lambda: up(run.model) > 0)
    stats = funicular.stats(run.model)
    assert TIGHT + stats.grown.peak <= CAPACITY - stats.grown.margin
    assert stats.budgets["hbm"].used >= stats.grown.taken
    assert any("grown" in line for line in str(stats).splitlines())
    assert stats.to_dict()["grown/taken"] == stats.grown.taken


def test_the_log_tells_of_a_set_of_moves_once(host_world, caplog):
    with caplog.at_level(logging.INFO, "funicular"):
        runs = grown(host_world)
        facts.eventually(lambda: (both(runs[1:], 1), told(caplog))[1])
        count = len(told(caplog))
        both(runs[1:], 3)
        assert len(told(caplog)) == count
        asked(runs[1])
        both(runs[1:], 3)
    assert len(told(caplog)) == count + 1
    assert "moved down" in told(caplog)[-1]


def told(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("FN-I309")]


@pytest.mark.parametrize("sections", [{}, {"optimizer": SPARE}], ids=["one set", "two sets"])
def test_checkpoints_know_nothing_of_it(host_world, tmp_path, sections):
    """Saved while states are up, and while they move; loaded where they are up, and where they are not."""
    runs = grown(host_world, **sections)
    paged = runs[1]
    handle = funicular.save(paged.model, paged.opt, tmp_path / "a", wait=False)
    asked(paged)
    both(runs, 2)
    handle.wait()
    both(runs, 12)
    facts.eventually(lambda: (both(runs, 1), up(paged.model))[1] > 0)
    agree(runs)
    funicular.save(paged.model, paged.opt, tmp_path / "b")
    asked(paged)
    funicular.save(paged.model, paged.opt, tmp_path / "c")
    assert contents(tmp_path / "b") == contents(tmp_path / "c")
    # Into a model whose states are up, and into a fresh one.
    others(paged, ROOMY)
    both(runs[1:], 30)
    facts.eventually(lambda: (both(runs[1:], 1), up(paged.model))[1] > 0)
    fresh = Run(host_world, True)
    fresh.model = fresh.wrap(stack()(), **sections)
    fresh.opt = fresh.adamw()
    for run in (paged, fresh):
        funicular.load(tmp_path / "b", run.model, run.opt)
    agree((fresh, paged))
    agree((runs[0], fresh))
    data = [run.data(4, WIDTH) for run in runs[:1]] * 2
    for run, x in zip((runs[0], paged), data, strict=True):
        run.step(run.model(x).float().square().mean(), look=False)
    agree(runs)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".safetensors"}


def test_unwrap_takes_the_states_along(host_world):
    runs = grown(host_world)
    assert up(runs[1].model) > 0
    funicular.unwrap(runs[1].model)
    agree(runs)
    both(runs, 3)
    agree(runs)


def test_growth_can_be_turned_off_and_the_model_closed(host_world):
    runs = grown(host_world)
    engine = testing.inspect(runs[1].model).engine
    funicular._core.let_grow(engine, False)
    assert up(runs[1].model) == 0
    both(runs, 20)
    assert up(runs[1].model) == 0
    agree(runs)
    runs = grown(host_world)
    testing.inspect(runs[1].model).engine.close()
    with pytest.raises(funicular.RuntimeFailure, match="FN-E104"):
        funicular.stats(runs[1].model)


def test_interrupted_moves(host_world):
    """Alarms strike while states move: no bit is lost, and the run goes on."""
    runs = grown(host_world)
    plain, paged = runs
    chance = random.Random(SEED)
    engine = testing.inspect(paged.model).engine
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    struck = 0
    try:
        for turn in range(60):
            for run in runs:
                run.opt.zero_grad()
                loss_of(run).backward()
            steps = engine.steps()
            others(paged, SHORT if turn % 5 == 4 else ROOMY)
            # The alarm strikes once, at the latest between the step's end and this one's own.
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 3e-3))
                try:
                    if turn % 3 == 2:
                        asked(paged)
                    paged.opt.step()
                except (KeyboardInterrupt, SystemError):  # SystemError: through a C++ frame of torch
                    struck += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            torch.set_grad_enabled(True)  # torch's own context managers may be struck too
            if engine.steps() > steps:
                plain.opt.step()
            agree(runs)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert struck > 0
