"""Exceptions at every position of a step, then training goes on, exactly."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models import WIDTH, Block, Stack, stack
from twin import Run, case, compare

pytestmark = pytest.mark.io_engines


class Boom(Exception):
    """What the user's code raises."""


class Trap(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise type(ctx.error)(*ctx.error.args)  # a new one: see test_torch_keeps.py


def fail_in_forward(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[3].up.register_forward_pre_hook(hook)


def fail_in_pre_hook(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[3].register_forward_pre_hook(hook)


def fail_in_pre_hook_before_ours(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[3].register_forward_pre_hook(hook, prepend=True)


def fail_in_post_hook(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[3].register_forward_hook(hook)


def fail_in_post_hook_before_ours(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[3].register_forward_hook(hook, prepend=True)


def fail_in_backward(run: Run, error: BaseException) -> None:
    return run.model.layers[3].down.register_forward_hook(lambda m, a, o: Trap.apply(o, error))


def fail_in_first_backward(run: Run, error: BaseException) -> None:
    return run.model.register_forward_hook(lambda m, a, o: Trap.apply(o, error))


def fail_in_last_backward(run: Run, error: BaseException) -> None:
    return run.model.inp.register_forward_hook(lambda m, a, o: Trap.apply(o, error))


def fail_in_parameter_hook(run: Run, error: BaseException) -> None:
    def hook(grad):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[2].up.weight.register_hook(hook)


def fail_in_post_accumulate_hook(run: Run, error: BaseException) -> None:
    def hook(p):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[2].up.weight.register_post_accumulate_grad_hook(hook)


def fail_in_backward_hook(run: Run, error: BaseException) -> None:
    def hook(*_):
        raise type(error)(*error.args)  # a new one: kept tracebacks keep whole steps alive

    return run.model.layers[2].register_full_backward_hook(hook)


POSITIONS = [
    fail_in_forward,
    fail_in_pre_hook,
    fail_in_pre_hook_before_ours,
    fail_in_post_hook,
    fail_in_post_hook_before_ours,
    fail_in_backward,
    fail_in_first_backward,
    fail_in_last_backward,
    fail_in_parameter_hook,
    fail_in_post_accumulate_hook,
    fail_in_backward_hook,
]


@pytest.mark.covering(2)
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("position", POSITIONS, ids=lambda f: f.__name__)
def test_then_parity(position, error, world):
    """The user's own exception comes out, weights stay readable, and the next steps are exact."""

    def script(run: Run) -> None:
        run.train(1, look=False)
        handle = position(run, error("here"))
        with pytest.raises(error, match="here"):
            run.model(run.data(4, WIDTH)).square().mean().backward()
        handle.remove()
        run.record_weights()
        run.opt.zero_grad()
        run.train(2)

    compare(world, stack(), script)


@pytest.mark.covering(2)
@pytest.mark.parametrize("position", [fail_in_forward, fail_in_backward], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reentrant", [True, False])
def test_with_checkpoints(position, reentrant, world):
    def script(run: Run) -> None:
        run.train(1)
        handle = position(run, Boom("here"))
        with pytest.raises(Boom, match="here"):
            run.model(run.data(4, WIDTH)).square().mean().backward()
        handle.remove()
        run.opt.zero_grad()
        run.train(2)

    compare(world, stack(call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant)), script)


@case(stack())
def test_failure_kept_alive(run: Run):
    """The exception, and with it every frame and activation, lives on."""
    run.train(1)
    handle = fail_in_forward(run, Boom("here"))
    kept = []
    for _ in range(3):
        try:
            run.model(run.data(4, WIDTH))
        except Boom as error:
            kept.append(error)
    handle.remove()
    run.train(2)
    del kept


@case(stack())
def test_part_of_a_backward_then_step(run: Run):
    """A failed backward leaves the gradients that had come; ``step`` uses them as torch would."""
    handle = fail_in_backward(run, Boom("here"))
    with pytest.raises(Boom):
        run.model(run.data(4, WIDTH)).square().mean().backward()
    handle.remove()
    run.record_grads()
    run.opt.step()
    run.opt.zero_grad()
    run.train(2)


@case(stack())
def test_failure_in_one_micro_batch(run: Run):
    """Skipped by the user; the others count."""
    for i in range(4):
        handle = fail_in_last_backward(run, Boom("here")) if i == 1 else None
        try:
            run.model(run.data(4, WIDTH)).square().mean().backward()
        except Boom:
            handle.remove()
    run.record_grads()
    run.opt.step()
    run.opt.zero_grad()
    run.train(1)


@case(stack())
def test_failure_in_eval(run: Run):
    run.train(1)
    handle = fail_in_forward(run, Boom("here"))
    with pytest.raises(Boom), torch.no_grad():
        run.model(run.data(4, WIDTH))
    with pytest.raises(Boom), torch.inference_mode():
        run.model(run.data(4, WIDTH))
    handle.remove()
    run.train(2)


@case(stack())
def test_failure_in_closure(run: Run):
    def closure():
        run.model(run.data(4, WIDTH)).square().mean().backward()
        raise Boom("here")

    with pytest.raises(Boom):
        run.opt.step(closure)
    run.record_weights()
    run.opt.zero_grad()
    run.train(2)


@case(stack())
def test_wrong_shape(run: Run):
    """An error of torch itself, from inside a block."""
    run.train(1)
    with pytest.raises(RuntimeError):
        run.model.layers[2](run.data(4, WIDTH + 1))
    run.train(2)


class RaisesOnce(Block):
    """Fails after its first product, with saved tensors already packed."""

    fuse: "list[int]" = []

    def forward(self, x):
        y = self.up(self.norm(x))
        if self.fuse:
            self.fuse.pop()
            raise Boom("here")
        return x + self.down(y.tanh())


@case()
def test_every_block_fails_once(run: Run):
    run.model = run.wrap(Stack(RaisesOnce))
    run.opt = run.adamw()
    for layer in run.model.layers:
        layer.fuse = [1]
        with pytest.raises(Boom):
            run.train(1)
        run.opt.zero_grad()
        run.train(1)


@case(stack())
def test_generator_left_open(run: Run):
    """A forward suspended in its middle, and closed later."""

    def walk():
        x = run.model.inp(run.data(4, WIDTH))
        for layer in run.model.layers:
            x = layer(x)
            yield x

    steps = walk()
    next(steps)
    next(steps)
    run.train(1)
    run.record("resumed", next(steps))
    steps.close()
    run.train(1)
