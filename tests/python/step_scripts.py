"""Training loops that touch gradients, weights and states between backward, step and the next forward: updates made ahead of their step, or
whose states follow later, must not show in them."""

import copy
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import funicular
from funicular.reference import ReferenceAdamW
from models import WIDTH, stack
from twin import Run

__all__ = ["SCRIPTS", "clipped_always", "clipping", "gradients_held", "loss_of", "plain_steps", "read_between"]


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


def clipped_always(run: Run) -> None:
    for _ in range(5):
        loss_of(run).backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        run.opt.step()
        run.opt.zero_grad()


def gradients_kept(run: Run) -> None:
    """Gradients that are read, edited and cleared in place right after the step, and added to."""
    for step in range(5):
        loss_of(run).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        run.opt.step()
        run.record("gradient", run.model.layers[1].up.weight.grad.clone())
        run.model.layers[2].up.weight.grad.mul_(0.5)
        if step % 2:
            run.opt.zero_grad(set_to_none=False)


def gradients_held(run: Run) -> None:
    """The tensor itself, and a view of another, while a second backward adds to them; an edit between the two."""
    for _ in range(3):
        loss_of(run).backward()
        held = run.model.layers[1].up.weight.grad
        view = run.model.layers[2].up.weight.grad[0]
        run.model.layers[3].up.weight.grad.mul_(0.5)
        loss_of(run).backward()
        run.record("held", [held.clone(), view.clone(), held is run.model.layers[1].up.weight.grad])
        del held, view
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        run.model.layers[0].up.weight.grad.mul_(2)  # as it is clipped
        loss_of(run).backward()
        run.opt.step()
        run.opt.zero_grad()


def accumulation(run: Run) -> None:
    for _ in range(3):
        for _ in range(3):
            loss_of(run).backward()
        run.opt.step()
        run.opt.zero_grad()


def clipped_accumulation(run: Run) -> None:
    """Two backwards a step, then three; bites in some steps only."""
    for step in range(6):
        for _ in range(2 + step // 3):
            loss_of(run).backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3 if step % 2 else 1e3))
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
            run.model.layers[0].up.weight.grad = None
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


def states_read(run: Run) -> None:
    """Right after the step, and after another forward."""
    for step in range(5):
        loss_of(run).backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        run.opt.step()
        if step % 2:
            loss_of(run)
        for i in (0, 2, 3):
            state = run.opt.state[run.model.layers[i].up.weight]
            run.record("states", [state["exp_avg"].clone().cpu(), state["exp_avg_sq"].clone().cpu()])
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
        run.record("before", [run.model.layers[i].up.weight.detach().clone() for i in (0, 2, 3)])
        run.record("moment", run.opt.state[run.model.layers[3].up.weight]["exp_avg"].clone().cpu())
        run.opt.step()
        run.record("after", [run.model.layers[i].up.weight.detach().clone() for i in (0, 2, 3)])
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


def saved_between(run: Run) -> None:
    """A save beside the backward and the step after it, and one of what was just updated ahead."""
    run.train(2, look=False)
    for _ in range(2):
        loss_of(run).backward()
        handle = save(run)
        run.opt.step()
        run.opt.zero_grad()
        loaded(run, handle)
        run.train(1, look=False)
    loaded(run, save(run))


def save(run: Run):
    """Begin a save on the offloaded side; on the other note what is there now."""
    if run.offloaded:
        folder = Path(tempfile.mkdtemp(dir="/var/tmp")) / "saved"
        return folder, funicular.save(run.model, run.opt, folder, wait=False)
    moments = [run.opt.state[p]["exp_avg"].clone() for p in run.model.parameters()]
    return [p.detach().clone() for p in run.model.parameters()], moments


def loaded(run: Run, handle) -> None:
    """Note what was saved."""
    if not run.offloaded:
        run.record("saved", handle)
        return
    folder, under_way = handle
    under_way.wait()
    model = stack()()
    opt = ReferenceAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    funicular.load(folder, model, opt, random=False)
    shutil.rmtree(folder.parent)
    moments = [opt.state[p]["exp_avg"] for p in model.parameters()]
    run.record("saved", ([p.detach() for p in model.parameters()], moments))


SCRIPTS = [
    plain_steps, clipping, clipped_always, gradients_kept, accumulation, clipped_accumulation, other_rhythm, skipped_step,
    learning_rate, scheduler, edited_gradient, gradient_through_an_alias, edited_weight, edited_states, states_read,
    states_loaded, read_between, evaluated_between, scaler, frozen_for_a_while, step_twice, failing_backward,
    saved_between,
]  # fmt: skip
