"""Parameters of units with spare frames change places with every update: the same bits for every use of either place at any time."""

import json
import threading

import pytest
import torch
from test_ahead import SPARE, run_offloaded, settle

import funicular
import turns
from models import WIDTH, stack
from mutations import wrap
from step_scripts import loss_of
from twin import Run, compare


def in_the_other_place(run: Run) -> None:
    """What reads and edits homes right after a step that left the parameters in their spare place."""
    for step in range(8):
        loss_of(run).backward()
        settle()
        run.opt.step()
        run.opt.zero_grad()
        layers = run.model.layers
        if step % 4 == 0:
            run.record("read", [layers[i].up.weight.detach().clone() for i in (3, 0, 2)])
        elif step % 4 == 1:
            with torch.no_grad():
                layers[3].up.weight.mul_(1.5)
                layers[1].up.weight.data.fill_(0.125)
        elif step % 4 == 2:
            run.record("state", run.opt.state[layers[2].up.weight]["exp_avg"])
            run.record_weights()
        with torch.no_grad():
            run.record("eval", run.model(run.data(4, WIDTH)))


def every_turn(run: Run) -> None:
    """Parameters in either place when something comes in between that was not foreseen."""
    for step in range(18):
        loss_of(run).backward()
        settle()
        layers = run.model.layers
        if step % 9 == 2:
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        elif step % 9 == 3:  # not all that is trained of it has a gradient
            layers[1].up.weight.grad = None
            layers[3].norm.bias.grad = None
        elif step % 9 == 4:  # what was begun into the home is undone, and begun again
            run.record("read", [layers[i].down.weight.detach().clone() for i in (0, 2, 3)])
            settle()
        elif step % 9 == 5:
            run.opt.param_groups[0]["lr"] *= 0.5
        elif step % 9 == 6:
            with torch.no_grad():
                layers[2].up.weight.mul_(1.5)
                layers[3].norm.weight.data.fill_(0.75)
        elif step % 9 == 7:
            run.record("state", run.opt.state[layers[2].up.weight]["exp_avg_sq"])
            run.opt.state[layers[3].up.weight]["exp_avg"].mul_(0.5)
        run.opt.step()
        run.opt.zero_grad(set_to_none=step % 2 == 0)
        if step % 9 == 8:
            run.record_weights()


#: Copies home take their time, and no step waits for one, on the host device neither: something comes from NVMe.
SLOW_HOME = {
    "optimizer": SPARE, "debug": {"faults": "home:delay=15ms"}, "override": [{"match": "layers.3*", "optimizer": "nvme"}],
}  # fmt: skip


@pytest.mark.parametrize("frames", [1.0, 3.0], ids=["one frame", "three frames"])
def test_frames_are_filled_before_homes(host_world, frames):
    run = compare(host_world, stack(), in_the_other_place, frames, **SLOW_HOME)
    assert funicular.stats(run.model).ahead.used >= 5, "hardly anything changed places"


@pytest.mark.parametrize("sections", [{"optimizer": SPARE}, SLOW_HOME], ids=["all on host", "slow home"])
@pytest.mark.parametrize("frames", [1.0, 3.0], ids=["one frame", "three frames"])
def test_parameters_change_places(host_world, frames, sections):
    run = compare(host_world, stack(), every_turn, frames, **sections)
    ahead = funicular.stats(run.model).ahead
    assert ahead.used >= 30, "hardly anything changed places"
    assert ahead.in_vain >= 5, "hardly anything was undone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_change_places(host_world, dtype):
    def script(run: Run) -> None:
        for step in range(8):
            run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            settle()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2 if step % 3 == 2 else 1e9))
            run.opt.step()
            run.opt.zero_grad()

    run = compare(host_world, lambda: stack()().to(dtype), script, optimizer=SPARE)
    assert funicular.stats(run.model).ahead.used >= 20


def test_part_of_what_is_in_the_spare_place(host_world):
    """Not all that is trained of a unit has a gradient: the rest must not stay behind."""

    def script(run: Run) -> None:
        for step in range(9):
            loss_of(run).backward()
            settle()
            if step % 3 == 2:  # the first step teaches, the second leaves the parameters in their spare place
                for layer in run.model.layers:
                    layer.norm.bias.grad = layer.up.weight.grad = None
            run.opt.step()
            run.opt.zero_grad()
            run.record("eval", run.model(run.data(4, WIDTH)))
        run.record_weights()

    run = compare(host_world, stack(), script, optimizer=SPARE)
    assert funicular.stats(run.model).ahead.used >= 10


@pytest.mark.parametrize("seed", range(6))
def test_random_programs(host_world, tmp_path, seed):
    """``make soak`` runs hundreds."""
    turns.one(host_world, seed, tmp_path)


def frozen_part() -> torch.nn.Module:
    model = stack()()
    for layer in model.layers:
        layer.up.bias.requires_grad_(False)
    return model


def test_units_that_are_frozen_in_part(host_world):
    """Their spare place lacks the rest, so they go home at once."""
    compare(host_world, frozen_part, every_turn_of_weights, optimizer=SPARE)


def every_turn_of_weights(run: Run) -> None:
    for step in range(6):
        loss_of(run).backward()
        settle()
        if step % 3 == 2:
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        run.opt.step()
        run.opt.zero_grad()
        run.record("read", run.model.layers[step % 4].down.weight.detach().clone())


def test_a_view_of_a_home_follows(host_world):
    """Who looks at a home by its address sees every step's result as soon as the step is over, in either place."""

    def script(run: Run) -> None:
        views = [run.model.layers[i].up.weight.detach() for i in (1, 3)]
        for step in range(6):
            loss_of(run).backward()
            settle()
            run.opt.step()
            run.opt.zero_grad()
            run.record("seen", [view.clone() for view in views])
            if step == 3:
                views.append(run.model.layers[2].down.weight.detach())

    compare(host_world, stack(), script, optimizer=SPARE)


def test_nothing_is_copied_home_that_nobody_needs(host_world, tmp_path):
    """Steady state: parameters go to and fro, in the trace is no copy; a weight that is read is copied, alone."""
    path = tmp_path / "trace.json"
    run = Run(host_world, True)
    log = {"trace": str(path), "trace_steps": [4, 5, 6, 7]}
    run.model = run.wrap(stack()(), optimizer=SPARE, log=log)
    run.opt = run.adamw()

    def step() -> None:
        loss_of(run).backward()
        settle()
        run.opt.step()
        run.opt.zero_grad()

    for _ in range(6):
        step()
    run.model.layers[2].up.weight.detach().sum()
    step()
    events = json.loads(path.read_text())["traceEvents"]
    assert any(e["name"].startswith("adamw speculative") for e in events)
    homed = [e for e in events if e["name"].startswith("copy home")]
    assert len(homed) <= 1
    assert funicular.stats(run.model).ahead.in_vain == 0


@pytest.mark.parametrize(("micro", "to_none"), [(1, True), (2, True), (1, False)])
def test_who_looks_at_gradients_needs_no_home(host_world, tmp_path, micro, to_none):
    path = tmp_path / "trace.json"
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), optimizer=SPARE, log={"trace": str(path), "trace_steps": [5, 6, 7]})
    run.opt = run.adamw()
    for _ in range(8):
        for _ in range(micro):
            loss_of(run).backward()
        settle()
        run.opt.step()
        run.opt.zero_grad(set_to_none=to_none)
    names = [e["name"] for e in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("adamw speculative") for name in names) >= 5
    assert not any(name.startswith("copy home") for name in names)


def test_view_taken_while_another_thread_steps(host_world, monkeypatch):
    """Between the wait for the home and the view that another thread takes there is a step: the view sees its result."""

    def script(run: Run) -> None:
        w = run.model.layers[2].up.weight
        for _ in range(3):
            run.step(loss_of(run), look=False)
        loss_of(run).backward()
        settle()
        got = []
        if run.offloaded:
            here, go = threading.Event(), threading.Event()

            def slow(access):
                def slow_access(self, *args, **more):
                    found = access(self, *args, **more)
                    if threading.current_thread().name == "reader" and not here.is_set():
                        here.set()
                        go.wait()
                    return found

                return slow_access

            wrap(monkeypatch, "funicular.windows.session.Session.access", slow)
            reader = threading.Thread(target=lambda: got.append(w.detach()), name="reader")
            reader.start()
            here.wait()
            run.opt.step()
            go.set()
            reader.join()
            monkeypatch.undo()
        else:
            got.append(w.detach())
            run.opt.step()
        settle(0.2)
        run.record("view", got[0].clone())
        run.opt.zero_grad()
        loss_of(run).backward()
        settle()
        run.record("view after the next backward", got[0].clone())
        run.opt.step()
        run.record("weight", w.detach().clone())

    compare(host_world, stack(), script, optimizer=SPARE)


@pytest.mark.parametrize("steps", [4, 5])
def test_unwrapped_in_either_place(host_world, steps):
    def trained(offloaded: bool) -> Run:
        run = Run(host_world, offloaded)
        run.model = run.wrap(stack()(), optimizer=SPARE)
        run.opt = run.adamw()
        for _ in range(steps):
            loss_of(run).backward()
            settle()
            run.opt.step()
            run.opt.zero_grad()
        loss_of(run).backward()
        settle()
        return run

    plain, paged = trained(False), trained(True)
    assert funicular.stats(paged.model).ahead.used >= 2 * 5
    funicular.unwrap(paged.model)
    for (name, a), b in zip(plain.model.named_parameters(), paged.model.parameters(), strict=True):
        assert torch.equal(a.cpu(), b.detach().cpu()), name


def test_updates_ahead_wait_for_no_copy_home(host_world):
    used, in_vain = run_offloaded(host_world, 4, lambda model: settle(0.3), **SLOW_HOME)
    quick = {key: value for key, value in SLOW_HOME.items() if key != "debug"}
    assert (used, in_vain) == run_offloaded(host_world, 4, lambda model: settle(0.3), **quick)
    assert used >= 2 * 5
