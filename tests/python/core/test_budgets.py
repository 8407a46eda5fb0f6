"""What a policy allows is never exceeded, in training, in ``state_dict`` and in ``unwrap``: by the runtime's own counters, by what the
system counts for the process, and in a cgroup that would end it.
"""

from __future__ import annotations

import gc
import re
import textwrap

import pytest
import torch

import cgroups
import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import CUDA, WIDTH, Stack
from twin import Run, World

pytestmark = pytest.mark.io_engines

MIB = 1 << 20


def least_host(world: World, depth: int = 4) -> int:
    """The smallest host budget that the model fits in, as the error names it, in bytes."""
    model = Stack(depth=depth)
    with pytest.raises(funicular.BudgetError, match="FN-E202") as caught:
        funicular.offload(model, world.policy(model, budget={"host": "4KiB"}))
    found = re.search(r"Raise budget\.host to ([0-9]+)([KMG]?)(?:i?B)", str(caught.value))
    assert found, str(caught.value)
    return int(found[1]) << 10 * " KMG".index(found[2] or " ")


def assert_within(run: Run, disk: str) -> None:
    for tier, budget in funicular.stats(run.model).budgets.items():
        assert budget.used <= budget.peak
        assert budget.limit is None or budget.peak <= budget.limit, tier
    assert funicular.stats(run.model).budgets["hbm"].limit is not None
    assert facts.disk_use(disk) <= (funicular.stats(run.model).budgets["nvme"].limit or 0)


def test_counters(world: World, disk: str):
    """With the least that the model fits in, in every use."""
    run = Run(world, True)
    least = least_host(world)
    run.model = run.wrap(Stack(), budget={"host": f"{least}B"})
    run.opt = run.adamw()
    run.train(3)
    assert_within(run, disk)
    for p in run.model.parameters():  # one by one
        p.detach().sum()
    assert_within(run, disk)
    copies = run.opt.state_dict()["state"]
    assert len(copies) == len(list(run.model.parameters()))
    assert_within(run, disk)
    if world.params == "host":
        assert all(v.isfinite().all() for v in run.model.state_dict().values())
    run.train(1)
    assert_within(run, disk)
    # Edits inside a window: the whole unit is written back.
    up = run.model.layers[1].up.weight
    with torch.no_grad():

        def edit(*_):
            up.mul_(1.0)

        handle = run.model.layers[1].register_forward_hook(edit)
        run.model(run.data(4, WIDTH))
        handle.remove()
    assert_within(run, disk)
    funicular.unwrap(run.model)


def test_states_that_are_held(two_worlds: World):
    """States that were read take part in the host budget: refused by name when it is full, given back when they are dropped."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack(depth=24), budget={"host": f"{least_host(two_worlds, depth=24) + 10 * WIDTH * WIDTH}B"})
    run.opt = run.adamw()
    run.train(1, look=False)

    def host():
        return funicular.stats(run.model).budgets["host"]

    params = [p for p in run.model.parameters() if p.ndim == 2]
    size = 4 * WIDTH * WIDTH
    used = host().used
    left = host().limit - used
    held = []
    with pytest.raises(funicular.BudgetError, match="FN-E205"):
        for p in params:
            for name in ("exp_avg", "exp_avg_sq"):
                held.append(run.opt.state[p][name])
                assert host().used == used + len(held) * size
    assert len(held) == left // size >= 2
    assert host().peak <= host().limit
    values = [t.clone() for t in held]
    held[0].mul_(2)
    del held
    for p in params:  # what is not held any more makes room
        run.opt.state[p]["exp_avg"].sum()
    assert torch.equal(run.opt.state[params[0]]["exp_avg"], values[0] * 2), "an edit was dropped with its tensor"
    run.train(1, look=False)
    assert host().used <= used
    assert len(run.opt.state_dict()["state"]) == len(list(run.model.parameters()))


# ------------------------------------------------------------------ as the system sees it


@pytest.mark.skipif(CUDA, reason="the compute tier of a GPU is not in the process's memory")
@pytest.mark.parametrize("placement", ["nvme-threads", "states-only"])
def test_memory_of_the_process(placement: str, disk: str):
    """PSS, looked at all the time by another thread."""
    body = children.TRAINED + textwrap.dedent("""
    peak = [0]
    over, looking = threading.Event(), threading.Lock()
    def watch():
        while not over.wait(0.05):  # a look takes a hundredth of a second itself
            with looking:
                peak[0] = max(peak[0], facts.all_pss())
    def looked_at(name, allowed, action):
        gc.collect()
        with looking:
            peak[0] = 0
        result = action()
        time.sleep(0.02)
        used = peak[0] - base
        print(f"{name}: {used / MIB:.1f} of {allowed / MIB:.1f} MiB", flush=True)
        assert used <= allowed, name
        return result
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    time.sleep(0.02)
    base = facts.all_pss()
    model = build()
    size = sum(p.numel() * 4 for p in model.parameters())
    # The weights are the user's until the last is offloaded.
    looked_at("offload", size + HBM + HOST, lambda: funicular.offload(model, policy(model)))
    opt = funicular.AdamW(model.parameters())
    looked_at("training", HBM + HOST + BESIDE, lambda: train(model, opt, 4))
    def read():
        for p in model.parameters(): p.detach().sum().item(); opt.state[p]["exp_avg"].sum().item()
    looked_at("reads", HBM + HOST + BESIDE, read)
    states = looked_at("state_dict", HBM + HOST + 2 * size + BESIDE, opt.state_dict)
    del states
    looked_at("training again", HBM + HOST + BESIDE, lambda: train(model, opt, 2))
    looked_at("unwrap", HBM + HOST + 3 * size + BESIDE, lambda: funicular.unwrap(model))
    gc.collect()
    time.sleep(0.1)
    left = facts.all_pss() - base
    print(f"after: {left / MIB:.1f} MiB")
    assert left <= 3 * size + BESIDE, "memory of the runtime is left"
    over.set()
    watcher.join()
    """)
    placements = {**PLACEMENTS, "states-only": {"params": "host", "optimizer": "nvme", "engine": "threads"}}
    if placement == "states-only":  # weights and gradients at home: twice the model
        body = body.replace("96 * MIB", "160 * MIB")
    for line in children.succeed(body, disk, placements[placement], DEVICE, children.EXACT):
        print(line)


@pytest.mark.skipif(CUDA, reason="CUDA's own memory on the host is not in the plan")
@pytest.mark.parametrize("percent", [5, -40])
def test_in_a_cgroup(percent: int, disk: str):
    """With 5 % more than the plan it trains; with 40 % less the system ends it, so the limit is one."""
    body = children.TRAINED + textwrap.dedent("""
    model = build()
    def enter():
        # What is there already is charged to another group: memory of this one is what comes from here on.
        open(GROUP + "/cgroup.procs", "w").write(str(os.getpid()))
    if PERCENT > 0: enter()
    funicular.offload(model, policy(model))
    if PERCENT < 0: enter()  # after it: with so little it would be refused by name
    opt = funicular.AdamW(model.parameters())
    train(model, opt, 3)
    for p in model.parameters():
        p.detach().sum().item()
        opt.state[p]["exp_avg"].sum().item()
    train(model, opt, 1)
    print("trained")
    """)
    plan, beside = (3 * 8 + 96) * MIB, 4 * 8 * MIB
    with cgroups.limited(int(plan * (1 + percent / 100)) + beside) as group:
        body = f"GROUP, PERCENT = {str(group)!r}, {percent}\n" + body
        status, out, err = children.finish(
            children.start(body, disk, PLACEMENTS["nvme-threads"], DEVICE, children.EXACT)
        )
        facts.eventually(lambda: not (group / "cgroup.procs").read_text())
    if percent < 0:
        assert status == -9, f"{status}\n{out}\n{err}"
    else:
        assert status == 0, f"{status}\n{out}\n{err}"
        assert out == "trained\n"


@pytest.mark.slow
@pytest.mark.timeout(1200)
# ``make soak`` takes all placements; with threads is the one that has gradients on disk, too.
@pytest.mark.parametrize("placement", ["host", "nvme-io_uring", "nvme-gradients"])
def test_nothing_grows(placement: str, disk: str, io_uring: bool):
    """Memory, descriptors, threads and disk over 80 steps; ``make soak`` takes thousands."""
    if placement == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    body = "import soak\nprint(soak.steady(world, 80, warm=40))"
    # No fork: its part of the pages that it shares grows as other processes end or write to theirs.
    print(children.succeed(body, disk, PLACEMENTS[placement], DEVICE, prefix=["env"], seconds=1100))
    gc.collect()
