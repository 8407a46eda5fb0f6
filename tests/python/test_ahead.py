"""Updates that begin during backward: the same bits for all that may happen between backward and step, and used where nothing happens."""

import copy

import pytest
import torch

import facts
import funicular
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
    facts.nap(seconds)


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
