"""Updates that begin during backward: the same bits whatever happens between backward and step, and used where nothing does."""

import copy
import json
import threading
import time

import pytest
import torch

import funicular
import turns
from funicular._session import Session
from models import WIDTH, stack
from twin import Run, compare

SPARE = {"spare": "32MiB"}


def loss_of(run: Run):
    return run.model(run.data(4, WIDTH)).square().mean()


def plain_steps(run: Run) -> None:
    run.train(5, look=False)


def clipping(run: Run) -> None:
    """Bites in some steps only."""
    for step in range(5):
        loss_of(run).backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3 if step % 2 else 1e3))
        run.opt.step()
        run.opt.zero_grad()


def accumulation(run: Run) -> None:
    for _ in range(3):
        for _ in range(3):
            loss_of(run).backward()
        run.opt.step()
        run.opt.zero_grad()


def other_rhythm(run: Run) -> None:
    """One backward a step, then two, then one."""
    for backwards in (1, 1, 2, 2, 1, 1):
        for _ in range(backwards):
            loss_of(run).backward()
        run.opt.step()
        run.opt.zero_grad()


def skipped_step(run: Run) -> None:
    """A backward whose gradients are thrown away."""
    for step in range(4):
        loss_of(run).backward()
        if step % 2 == 0:
            run.opt.step()
        run.opt.zero_grad()


def learning_rate(run: Run) -> None:
    for step in range(4):
        loss_of(run).backward()
        run.opt.param_groups[0]["lr"] = 1e-3 * (step + 1)
        run.opt.step()
        run.opt.zero_grad()


def scheduler(run: Run) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(run.opt, lambda step: 1 / (1 + step))
    for _ in range(4):
        run.step(loss_of(run), look=False)
        schedule.step()


def edited_gradient(run: Run) -> None:
    for _ in range(4):
        loss_of(run).backward()
        with torch.no_grad():
            run.model.layers[1].up.weight.grad.mul_(3)
            run.model.layers[2].up.weight.grad[0] = 0.25
            run.model.layers[3].up.weight.grad = torch.full_like(run.model.layers[3].up.weight, 0.01)
            run.model.layers[4].up.weight.grad = None
        run.opt.step()
        run.opt.zero_grad()


def gradient_through_an_alias(run: Run) -> None:
    """A view taken in one step and written through in the next."""
    loss_of(run).backward()
    alias = run.model.layers[2].up.weight.grad.detach()
    run.opt.step()
    run.opt.zero_grad(set_to_none=False)
    loss_of(run).backward()
    alias.add_(1.0)
    run.opt.step()
    run.opt.zero_grad()
    run.train(2)


def edited_weight(run: Run) -> None:
    for _ in range(4):
        loss_of(run).backward()
        with torch.no_grad():
            run.model.layers[2].up.weight.mul_(1.5)
            run.model.layers[3].up.weight.data.fill_(0.125)
        run.opt.step()
        run.opt.zero_grad()


def edited_states(run: Run) -> None:
    run.train(2)
    for _ in range(2):
        loss_of(run).backward()
        run.opt.state[run.model.layers[2].up.weight]["exp_avg"].mul_(0.5)
        run.opt.step()
        run.opt.zero_grad()


def states_loaded(run: Run) -> None:
    run.train(2)
    saved = copy.deepcopy(run.opt.state_dict())
    run.train(2)
    loss_of(run).backward()
    run.opt.load_state_dict(saved)
    run.opt.step()
    run.opt.zero_grad()
    run.train(2)


def read_between(run: Run) -> None:
    """Before the step everything is as it was, after it as it is to be."""
    run.train(1)
    for _ in range(3):
        loss_of(run).backward()
        run.record("before", [run.model.layers[i].up.weight.detach().clone() for i in (0, 3, 5)])
        run.record("moment", run.opt.state[run.model.layers[3].up.weight]["exp_avg"].clone().cpu())
        run.opt.step()
        run.record("after", [run.model.layers[i].up.weight.detach().clone() for i in (0, 3, 5)])
        run.opt.zero_grad()


def evaluated_between(run: Run) -> None:
    for _ in range(3):
        loss_of(run).backward()
        with torch.no_grad():
            run.record("eval", run.model(run.data(4, WIDTH)))
        run.opt.step()
        run.opt.zero_grad()


def scaler(run: Run) -> None:
    """Every second step overflows and is skipped."""
    scaler = torch.amp.GradScaler(run.device.type, init_scale=256.0, growth_interval=1000)
    for step in range(6):
        scaler.scale(loss_of(run) * (float("inf") if step % 2 else 1.0)).backward()
        scaler.unscale_(run.opt)
        scaler.step(run.opt)
        scaler.update()
        run.opt.zero_grad()


def frozen_for_a_while(run: Run) -> None:
    for step in range(4):
        run.model.layers[2].up.weight.requires_grad_(step % 2 == 0)
        run.step(loss_of(run), look=False)


def step_twice(run: Run) -> None:
    for _ in range(2):
        loss_of(run).backward()
        run.opt.step()
        run.opt.step()
        run.opt.zero_grad()


def failing_backward(run: Run) -> None:
    run.train(2)
    handle = run.model.layers[1].up.weight.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(run).backward()
    handle.remove()
    run.opt.zero_grad()
    run.train(2)


SCRIPTS = [
    plain_steps, clipping, accumulation, other_rhythm, skipped_step, learning_rate, scheduler, edited_gradient,
    gradient_through_an_alias, edited_weight, edited_states, states_loaded, read_between, evaluated_between, scaler,
    frozen_for_a_while, step_twice, failing_backward,
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_same_bits(host_world, script):
    compare(host_world, stack(), script, optimizer=SPARE)


def in_the_other_place(run: Run) -> None:
    """What reads and edits homes right after a step that left the parameters in their spare place."""
    for step in range(8):
        loss_of(run).backward()
        settle()
        run.opt.step()
        run.opt.zero_grad()
        layers = run.model.layers
        if step % 4 == 0:
            run.record("read", [layers[i].up.weight.detach().clone() for i in (5, 0, 3)])
        elif step % 4 == 1:
            with torch.no_grad():
                layers[4].up.weight.mul_(1.5)
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
            run.record("read", [layers[i].down.weight.detach().clone() for i in (0, 3, 5)])
            settle()
        elif step % 9 == 5:
            run.opt.param_groups[0]["lr"] *= 0.5
        elif step % 9 == 6:
            with torch.no_grad():
                layers[2].up.weight.mul_(1.5)
                layers[4].norm.weight.data.fill_(0.75)
        elif step % 9 == 7:
            run.record("state", run.opt.state[layers[2].up.weight]["exp_avg_sq"])
            run.opt.state[layers[3].up.weight]["exp_avg"].mul_(0.5)
        run.opt.step()
        run.opt.zero_grad(set_to_none=step % 2 == 0)
        if step % 9 == 8:
            run.record_weights()


#: Copies home take their time, and no step waits for one, on the host device neither: something comes from NVMe.
SLOW_HOME = {
    "optimizer": SPARE, "debug": {"faults": "home:delay=15ms"}, "override": [{"match": "layers.5*", "optimizer": "nvme"}],
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
        run.record("read", run.model.layers[step].down.weight.detach().clone())


def test_a_view_of_a_home_follows(host_world):
    """Who looks at a home by its address sees every step's result as soon as the step is over, in either place."""

    def script(run: Run) -> None:
        views = [run.model.layers[i].up.weight.detach() for i in (1, 4)]
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
    assert any(e["name"].startswith("adamw ahead") for e in events)
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
    assert sum(name.startswith("adamw ahead") for name in names) >= 5
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
            access = Session.access

            def slow_access(self, *args, **more):
                found = access(self, *args, **more)
                if threading.current_thread().name == "reader" and not here.is_set():
                    here.set()
                    go.wait()
                return found

            monkeypatch.setattr(Session, "access", slow_access)
            reader = threading.Thread(target=lambda: got.append(w.detach()), name="reader")
            reader.start()
            here.wait()
            run.opt.step()
            go.set()
            reader.join()
            monkeypatch.setattr(Session, "access", access)
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


@pytest.mark.parametrize("script", [plain_steps, clipping, read_between], ids=lambda s: s.__name__)
def test_two_groups(host_world, script):
    """Units whose parameters have different hyperparameters."""

    def grouped(run: Run) -> None:
        decay = [p for p in run.model.parameters() if p.dim() > 1]
        rest = [p for p in run.model.parameters() if p.dim() < 2]
        run.opt = run.adamw([{"params": rest, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.3}])
        script(run)

    compare(host_world, stack(), grouped, optimizer=SPARE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(host_world, dtype):
    def script(run: Run) -> None:
        for step in range(5):
            run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2 if step % 2 else 1e3))
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, lambda: stack()().to(dtype), script, optimizer=SPARE)


def run_offloaded(world, steps: int, between=lambda model: None, **sections) -> tuple[int, int]:
    model = stack()()
    funicular.offload(model, world.policy(model, **sections))
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(4, WIDTH, device=world.torch_device)).square().mean().backward()
        between(model)
        opt.step()
        opt.zero_grad()
    for p in model.parameters():  # its last update is over
        p.detach().sum()
    stats = funicular.stats(model)
    funicular.unwrap(model)
    return stats.ahead.used, stats.ahead.in_vain


def test_what_was_begun_is_used(host_world):
    """All units but in the first step, which teaches; how much of each was done by then depends on the machine."""
    used, in_vain = run_offloaded(host_world, 6, lambda model: settle(), optimizer=SPARE)
    assert used >= 5, "hardly anything was foreseen"
    assert in_vain == 0


def settle(seconds: float = 0.05) -> None:
    """Give the runner the time that a GPU's backward would."""
    time.sleep(seconds)


def test_updates_ahead_wait_for_no_copy_home(host_world):
    used, in_vain = run_offloaded(host_world, 4, lambda model: settle(0.3), **SLOW_HOME)
    quick = {key: value for key, value in SLOW_HOME.items() if key != "debug"}
    assert (used, in_vain) == run_offloaded(host_world, 4, lambda model: settle(0.3), **quick)
    assert used >= 2 * 5


def test_nothing_is_begun_without_spare_frames(host_world):
    assert run_offloaded(host_world, 3, lambda model: settle(), optimizer={"spare": "0B"}) == (0, 0)


def test_a_touched_gradient_is_in_vain(host_world):
    def touch(model):
        settle()
        for p in model.parameters():
            p.grad.mul_(1.0)

    used, in_vain = run_offloaded(host_world, 4, touch, optimizer=SPARE)
    assert used == 0
    assert in_vain > 0
