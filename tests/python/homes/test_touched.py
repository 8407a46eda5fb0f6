"""Weights on NVMe that something touches past torch's dispatcher: the bytes are there, edits of them count, updates show."""

import ctypes
import re
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

import children
import funicular
from conftest import DEVICE, PLACEMENTS
from funicular import testing
from models import CUDA, WIDTH, Linear, Stack, stack
from twin import Run, World, compare

pytestmark = pytest.mark.skipif(CUDA, reason="the processor touches what a GPU's kernels would")
NVME = PLACEMENTS["nvme-threads"]


def floats_of(weight: torch.Tensor) -> np.ndarray:
    """A weight's memory by its address, which no guard was asked for."""
    place = testing.inspect_parameter(weight)
    address = weight.data_ptr() if place is None else place.home_address
    return np.ctypeslib.as_array((ctypes.c_float * weight.numel()).from_address(address))


def both(world: World, script: Callable[[Run], None]) -> None:
    compare(world, stack(depth=3), script, frames=40, debug={"poison": False})


@pytest.fixture(params=["nvme-threads", "nvme-io_uring"])
def on_disk(request: pytest.FixtureRequest, disk: str, io_uring: bool) -> World:
    if request.param == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    return World(DEVICE, (disk,), **PLACEMENTS[request.param])


def test_read(on_disk: World):
    def script(run: Run) -> None:
        for _ in range(3):
            run.train(1, look=False)
            run.record("bytes", [torch.from_numpy(floats_of(p).copy()) for p in run.model.parameters()])

    both(on_disk, script)


def test_read_while_an_update_is_under_way(nvme_world: World):
    """The bytes are those after the step."""

    def script(run: Run) -> None:
        for _ in range(3):
            run.model(run.data(4, WIDTH)).square().mean().backward()
            run.opt.step()
            run.record("bytes", torch.from_numpy(floats_of(run.model.layers[1].up.weight).copy()))
            run.opt.zero_grad()

    both(nvme_world, script)


def test_edited(nvme_world: World):
    """An edit counts in the next forward, in the next step, and after both."""

    def script(run: Run) -> None:
        run.train(1, look=False)
        for factor in (0.5, 2.0):
            weights = [run.model.layers[i].up.weight for i in (0, 2)]
            for weight in weights:
                floats_of(weight)[:] *= factor
            with torch.no_grad():
                run.record("out", run.model(run.data(4, WIDTH)))
            run.train(1, look=False)
            run.record_weights()

    both(nvme_world, script)


def test_edited_between_backward_and_step(nvme_world: World):
    """Also where the update has begun before its step."""

    def script(run: Run) -> None:
        for _ in range(3):
            run.model(run.data(4, WIDTH)).square().mean().backward()
            floats_of(run.model.layers[1].up.weight)[:] *= 0.5
            run.opt.step()
            run.opt.zero_grad()
            run.record_weights()

    both(nvme_world, script)


def test_edited_and_saved(nvme_world: World, tmp_path):
    run = Run(nvme_world, True)
    run.model = run.wrap(Stack())
    weight = run.model.layers[1].up.weight
    floats_of(weight)[:] = 0.25
    funicular.save(run.model, None, tmp_path / "c")
    with torch.no_grad():
        weight.zero_()
    funicular.load(tmp_path / "c", run.model)
    assert bool((weight == 0.25).all())
    floats_of(weight)[:] = 0.5
    funicular.unwrap(run.model)
    assert bool((weight == 0.5).all())


def test_a_parameter_that_lost_its_model(nvme_world: World):
    """Edits of what is touched are there when the parameters become ordinary ones."""
    model = Stack()
    funicular.offload(model, nvme_world.policy(model))
    weight = model.layers[1].up.weight
    floats_of(weight)[:] = 0.25
    del model
    assert bool((weight == 0.25).all())


def test_the_budget_counts_it(nvme_world: World):
    run = Run(nvme_world, True)
    run.model = run.wrap(Stack())
    before = funicular.stats(run.model).budgets["host"].used
    for p in run.model.parameters():
        floats_of(p)[0]
    assert funicular.stats(run.model).budgets["host"].used > before
    with torch.no_grad():
        run.model(run.data(4, WIDTH))  # gives it back
    assert funicular.stats(run.model).budgets["host"].used == before


def test_many_threads(nvme_world: World):
    """Each sees whole weights, none before they are there."""
    run = Run(nvme_world, True)
    run.model = run.wrap(Stack())
    weights = [layer.up.weight for layer in run.model.layers]
    expect = [w.detach().clone().flatten().numpy() for w in weights]
    with torch.no_grad():
        run.model(run.data(4, WIDTH))
    wrong = []
    barrier = threading.Barrier(8)

    def work(first: int) -> None:
        barrier.wait()
        for i in range(len(weights)):
            at = (first + i) % len(weights)
            if not np.array_equal(floats_of(weights[at]), expect[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


TOUCH = """
from funicular.testing import inspect_parameter
import ctypes
model = Stack(depth=8)
funicular.offload(model, merge(world.policy(model), {more!r}))
with torch.no_grad(): model(torch.ones(4, WIDTH))
def touch(layer):
    return ctypes.c_float.from_address(inspect_parameter(layer.up.weight).home_address).value
"""


def run(body: str, disk: str, more: dict | None = None) -> tuple[int, str, str]:
    return children.finish(children.start(TOUCH.format(more=more or {}) + body, disk, NVME))


#: One weight after the other can be read; all at once are more host memory than is allowed.
TIGHT = """
from funicular.testing import inspect_parameter
import ctypes
from torch import nn
model = nn.Sequential(*[nn.Sequential(nn.Linear(256, 256)) for _ in range(16)])
budget = {"hbm": "64MiB", "host": "7MiB", "nvme": "64MiB"}
tiers = {"params": {"tier": "nvme"}, "optimizer": {"tier": "nvme"}}
funicular.offload(model, {"device": "host", "budget": budget, "nvme": {"paths": [disk]}, **tiers})
def touch(block):
    return ctypes.c_float.from_address(inspect_parameter(block[0].weight).home_address).value
def edit(block, value):
    ctypes.c_float.from_address(inspect_parameter(block[0].weight).home_address).value = value
"""


def run_tight(body: str, disk: str) -> tuple[int, str, str]:
    return children.finish(children.start(TIGHT + body, disk, NVME))


def test_what_was_only_read_makes_room(disk: str):
    body = """
for _ in range(3):
    values = [touch(block) for block in model]
again = [block[0].weight.detach()[0, 0].item() for block in model]
assert values == again, (values, again)
print("same")
"""
    status, out, err = run_tight(body, disk)
    assert (status, out) == (0, "same\n"), err


def test_what_was_edited_stays(disk: str):
    """Others make room for it; and it is seen by the guard."""
    body = """
edit(model[0], 0.5)
values = [touch(block) for block in model]
assert values[0] == 0.5
again = [block[0].weight.detach()[0, 0].item() for block in model]
assert values == again, (values, again)
print("same")
"""
    status, out, err = run_tight(body, disk)
    assert (status, out) == (0, "same\n"), err


def test_what_cannot_be_brought_ends_the_process_by_name(disk: str):
    body = """
held = []
for block in model:
    try:
        held.append(block[0].weight.detach())
    except funicular.BudgetError:
        break
print("began", flush=True)
touch(block)
print("went on", flush=True)
"""
    status, out, err = run_tight(body, disk)
    assert (status, out) == (-signal.SIGSEGV, "began\n"), err
    assert "FN-E205" in err
    assert re.search(r"'\d+' lives on NVMe", err)
    assert "detach()" in err


def test_a_model_that_is_gone(disk: str):
    body = """
address = inspect_parameter(model.layers[1].up.weight).home_address
kept = model.layers[0].up.weight
del model
import gc; gc.collect()
kept.sum()
print("began", flush=True)
ctypes.c_float.from_address(address).value
"""
    status, out, err = run(body, disk)
    assert (status, out) == (-signal.SIGSEGV, "began\n"), err
    assert "FN-E104 'layers.1'" in err


HANDLERS = {
    "faulthandler before": ("import faulthandler; faulthandler.enable()\n", ""),
    "none": ("", ""),
    "after": ("", "import faulthandler; faulthandler.enable()\n"),
}


@pytest.mark.parametrize("when", HANDLERS)
def test_other_faults_are_what_they_were(when: str, disk: str):
    """A fault that is no business of ours ends the process as without us, with the traceback of who else looks."""
    before, after = HANDLERS[when]
    body = after + 'print("began", flush=True)\nctypes.c_float.from_address(16).value\n'
    code = before + TOUCH.format(more={}) + body
    status, out, err = children.finish(children.start(code, disk, NVME))
    assert (status, out) == (-signal.SIGSEGV, "began\n"), err
    assert ("Fatal Python error: Segmentation fault" in err) == (when != "none")
    assert "FN-" not in err


def test_a_handler_that_came_later(disk: str):
    """The next use of the model puts ours before it."""
    body = """
import faulthandler; faulthandler.enable()
with torch.no_grad(): model(torch.ones(4, WIDTH))
assert touch(model.layers[1]) == model.layers[1].up.weight.detach().flatten()[0].item()
print("same", flush=True)
ctypes.c_float.from_address(16).value
"""
    status, out, err = run(body, disk)
    assert (status, out) == (-signal.SIGSEGV, "same\n"), err
    assert err.count("Fatal Python error") == 1


def test_a_signal_that_was_sent(disk: str):
    status, out, err = run('print("began", flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(5)\n', disk)
    assert (status, out) == (-signal.SIGSEGV, "began\n"), err


def test_interrupted_while_it_waits(disk: str):
    """Ctrl-C comes after the bytes."""
    body = """
def nag():
    for _ in range(200):
        os.kill(os.getpid(), signal.SIGUSR1)
signal.signal(signal.SIGUSR1, lambda *_: None)
nagger = threading.Thread(target=nag)
nagger.start()
values = [touch(layer) for layer in model.layers]
nagger.join()
assert values == [layer.up.weight.detach().flatten()[0].item() for layer in model.layers]
print("same")
"""
    status, out, err = run(body, disk)
    assert (status, out) == (0, "same\n"), err


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda c: c.__name__)
def test_compiled_steps(kind, two_worlds: World):
    """Several steps of an optimizer compiled by inductor: the same bits over weights on NVMe as over ordinary ones."""

    def script(run: Run) -> None:
        torch._dynamo.reset()
        opt = kind(run.model.parameters(), lr=1e-2)
        step = torch.compile(opt.step)
        for _ in range(4):
            loss = run.model(run.data(4, WIDTH)).square().mean()
            run.record("loss", loss)
            loss.backward()
            step()
            opt.zero_grad()
        run.record_weights()

    # Inductor takes its time for each parameter.
    compare(two_worlds, stack(lambda: Linear(WIDTH, WIDTH), depth=1), script, frames=2)


def test_compiled_steps_without_room_are_refused(disk: str):
    """By an exception, before anything is touched."""
    body = """
opt = torch.optim.SGD(model.parameters(), lr=1e-2)
step = torch.compile(opt.step, backend="eager")
before = [p.detach().clone() for p in model.parameters()]
model(torch.ones(2, 256)).sum().backward()
try:
    step()
except funicular.BudgetError as error:
    print(str(error)[:8])
assert all(torch.equal(a, p.detach()) for a, p in zip(before, model.parameters(), strict=True))
"""
    status, out, err = run_tight(body, disk)
    assert (status, out) == (0, "FN-E205 \n"), err
