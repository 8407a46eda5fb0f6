"""``p.grad`` is the user's: read, clipped, scaled, replaced, accumulated, cleared."""

import pytest
import torch
from torch import nn

from models import WIDTH, Decoder, Stack, stack
from twin import Run, case, compare

pytestmark = pytest.mark.gradients


def backward(run: Run, count: int = 1) -> None:
    for _ in range(count):
        loss = run.model(run.data(4, WIDTH)).square().mean() / count
        run.record("loss", loss)
        loss.backward()


def step(run: Run) -> None:
    run.record_grads()
    run.opt.step()
    run.opt.zero_grad()


@pytest.mark.covering(2)
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zero"])
def test_accumulation(count, to_none, world):
    def script(run: Run) -> None:
        for _ in range(3):
            backward(run, count)
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad(set_to_none=to_none)

    compare(world, stack(), script)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_accumulation_of_halves(dtype, world):
    def script(run: Run) -> None:
        for _ in range(3):
            for _ in range(3):
                run.model(run.tokens(2, 9)).backward()
            step(run)

    compare(world, lambda: Decoder(True, dtype=dtype), script)


@case(stack())
def test_uneven_accumulation(run: Run):
    """Some backwards reach only some blocks."""
    for _ in range(2):
        backward(run)
        x = run.data(4, WIDTH)
        for layer in run.model.layers[1:4]:
            x = layer(x)
        x.mean().backward()
        backward(run)
        step(run)


@case(stack())
def test_steps_without_clearing(run: Run):
    for _ in range(3):
        backward(run)
        run.record_grads()
        run.opt.step()


@case(stack())
def test_cleared_by_the_model(run: Run):
    for to_none in (True, False, True):
        backward(run)
        run.record_grads()
        run.opt.step()
        run.model.zero_grad(set_to_none=to_none)
        run.record_grads()


@case(stack())
def test_cleared_by_hand(run: Run):
    for i in range(3):
        backward(run)
        run.opt.step()
        for p in run.model.parameters():
            if i % 2:
                p.grad = None
            else:
                p.grad.zero_()


@case(stack())
def test_cleared_before_step(run: Run):
    """Gradients thrown away are thrown away; the next ones do not sum with them."""
    backward(run)
    run.opt.zero_grad()
    run.opt.step()
    backward(run)
    step(run)


@pytest.mark.covering(2)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_clip_grad_norm(limit, foreach, world):
    def script(run: Run) -> None:
        for _ in range(3):
            backward(run, 2)
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), limit, foreach=foreach))
            step(run)

    compare(world, stack(), script)


@pytest.mark.parametrize("kind", [1.0, float("inf")])
def test_other_norms(kind, host_world):
    def script(run: Run) -> None:
        for _ in range(2):
            backward(run)
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), 0.1, norm_type=kind))
            step(run)

    compare(host_world, stack(), script)


@case(stack())
def test_clip_grad_value(run: Run):
    for _ in range(3):
        backward(run)
        nn.utils.clip_grad_value_(run.model.parameters(), 1e-3)
        step(run)


@case(stack())
def test_clip_per_layer(run: Run):
    for _ in range(2):
        backward(run)
        for layer in run.model.layers:
            run.record("norm", nn.utils.clip_grad_norm_(layer.parameters(), 0.01))
        step(run)


@case(stack())
def test_clip_between_backwards(run: Run):
    for _ in range(2):
        backward(run)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        backward(run)
        step(run)


EDITS = {
    "mul": lambda p, t: p.grad.mul_(0.5),
    "data": lambda p, t: p.grad.data.mul_(0.5),
    "add": lambda p, t: p.grad.add_(t),
    "row": lambda p, t: p.grad[0].zero_(),
    "replace": lambda p, t: setattr(p, "grad", t),
    "replace_scaled": lambda p, t: setattr(p, "grad", p.grad * 0.5),
    "replace_clone": lambda p, t: setattr(p, "grad", p.grad.clone()),
    "drop": lambda p, t: setattr(p, "grad", None),
    "nan": lambda p, t: p.grad.view(-1)[:1].fill_(float("nan")),
    "sign": lambda p, t: p.grad.sign_(),
    "expand": lambda p, t: setattr(p, "grad", t.flatten()[:1].expand(p.numel()).reshape(p.shape)),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("edit", EDITS)
def test_edit(edit, world):
    """Gradients of three blocks edited between backward and step."""

    def script(run: Run) -> None:
        for _ in range(2):
            backward(run)
            with torch.no_grad():
                for i in (0, 2, 3):
                    for p in run.model.layers[i].parameters():
                        EDITS[edit](p, run.data(*p.shape))
            step(run)

    compare(world, stack(), script)


@case(stack())
def test_edit_then_accumulate(run: Run):
    """A replaced gradient takes the next backward's sum."""
    for _ in range(2):
        backward(run)
        for p in run.model.parameters():
            p.grad = run.data(*p.shape)
        backward(run)
        step(run)


@case(stack())
def test_gradient_made_by_hand(run: Run):
    """No backward at all."""
    for _ in range(2):
        for p in run.model.layers[1].parameters():
            p.grad = run.data(*p.shape)
        step(run)


@case(stack())
def test_gradient_kept_by_the_user(run: Run):
    """A reference held over ``zero_grad`` and the next backward, as torch would keep it."""
    backward(run)
    kept = [p.grad for p in run.model.parameters()]
    copies = [g.clone() for g in kept]
    run.opt.step()
    run.opt.zero_grad()
    backward(run)
    run.record("copies", copies)
    run.record("kept", kept)
    step(run)


@case(stack())
def test_gradient_swapped_between_parameters(run: Run):
    for _ in range(2):
        backward(run)
        a, b = run.model.layers[0].up.weight, run.model.layers[3].up.weight
        a.grad, b.grad = b.grad, a.grad
        step(run)


@case(stack())
def test_noise_added(run: Run):
    for _ in range(2):
        backward(run)
        torch._foreach_add_(
            [p.grad for p in run.model.parameters()], [run.data(*p.shape) * 0.01 for p in run.model.parameters()]
        )
        step(run)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_grad_scaler(bad, world):
    """Steps whose gradients are not finite are skipped, with nothing changed."""

    def script(run: Run) -> None:
        scaler = torch.amp.GradScaler(run.device.type, init_scale=1024.0, growth_interval=2)
        for i in range(6):
            loss = run.model(run.data(4, WIDTH)).square().mean()
            scaler.scale(loss * (bad if i in (1, 4) else 1.0)).backward()
            if i % 2:
                scaler.unscale_(run.opt)
                nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
            scaler.step(run.opt)
            scaler.update()
            run.record("scale", scaler.get_scale())
            run.record_grads()
            run.opt.zero_grad()

    compare(world, stack(), script)


@case(stack())
def test_skipped_steps(run: Run):
    for i in range(4):
        backward(run)
        if i % 2:
            run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_step_twice(run: Run):
    backward(run)
    run.opt.step()
    run.opt.step()
    step(run)


@case(stack())
def test_eval_between_micro_batches(run: Run):
    for _ in range(2):
        backward(run)
        run.model.eval()
        with torch.no_grad():
            run.record("eval", run.model(run.data(4, WIDTH)))
        with torch.inference_mode():
            run.record("inference", run.model(run.data(4, WIDTH)))
        run.model.train()
        backward(run)
        step(run)


@case(stack())
def test_inference_before_training(run: Run):
    """The first use of every weight happens in inference mode."""
    with torch.inference_mode():
        run.record("inference", run.model(run.data(4, WIDTH)))
    run.train(3)


@case(stack())
def test_inference_right_after_step(run: Run):
    for _ in range(3):
        run.train(1, look=False)
        with torch.inference_mode():
            run.record("inference", run.model(run.data(4, WIDTH)))


@case(Decoder)
def test_generate_loop(run: Run):
    """Train, generate token by token, train."""
    for _ in range(2):
        run.train(1, look=False)
        run.model.eval()
        tokens = run.tokens(1, 3)
        with torch.no_grad():
            for _ in range(5):
                tokens = torch.cat([tokens, run.model.logits(tokens)[:, -1:].argmax(-1)], -1)
        run.record("tokens", tokens)
        run.model.train()


@case(stack())
def test_gradients_seen_right_after_backward(run: Run):
    """Read in another order than they arrived, while copies may be under way."""
    backward(run)
    for p in reversed(list(run.model.parameters())):
        run.record("grad", p.grad)
        run.record("sum", p.grad.sum())
    run.record("norms", torch._foreach_norm([p.grad for p in run.model.parameters()]))
    run.record("isfinite", all(bool(torch.isfinite(p.grad).all()) for p in run.model.parameters()))
    step(run)


@case()
def test_huge_and_tiny_gradients(run: Run):
    """Denormals, signed zeros and overflow keep their bits."""
    run.model = run.wrap(Stack())
    run.opt = run.adamw(weight_decay=0.0)
    for scale in (1e-38, 1e-42, 1e30, 0.0):
        for p in run.model.parameters():
            p.grad = run.data(*p.shape) * scale
        run.opt.step()
        run.record_weights()
