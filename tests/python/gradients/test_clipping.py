"""Clipping by norm: torch's own function, with the bits it has over ordinary gradients, and without a pass over homed ones."""

import pkgutil
import signal

import pytest
import torch

import funicular
from models import WIDTH, stack
from mutations import wrap
from twin import Run, case, compare

pytestmark = pytest.mark.gradients


def grads(run: Run) -> list[torch.Tensor]:
    return [p for p in run.model.parameters() if p.grad is not None]


def clipped_steps(run: Run, steps: int, *, max_norm: float, look: bool = False, **options) -> None:
    for _ in range(steps):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        loss.backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm, **options))
        if look:
            run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@pytest.mark.covering(2)
@pytest.mark.parametrize("look", [False, True], ids=["blind", "looking"])
@pytest.mark.parametrize("max_norm", [1e-3, 1e6], ids=["bites", "idle"])
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"foreach": True}], ids=["auto", "single", "foreach"])
def test_clip_grad_norm(world, max_norm, options, look):
    compare(world, stack(), lambda run: clipped_steps(run, 4, max_norm=max_norm, look=look, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(two_worlds, dtype):
    compare(two_worlds, lambda: stack()().to(dtype), lambda run: steps_in(run, dtype))


def steps_in(run: Run, dtype: torch.dtype) -> None:
    for _ in range(4):
        loss = run.model(run.data(4, WIDTH).to(dtype)).float().square().mean()
        loss.backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2))
        run.opt.step()
        run.opt.zero_grad()


def test_factor_of_another_type(two_worlds):
    """Norm layers in fp32 make the factor fp32; what multiplies bf16 gradients is what torch makes of it."""

    def build():
        model = stack()().to(torch.bfloat16)
        for layer in model.layers:
            layer.norm.float()
            layer.norm.register_forward_pre_hook(lambda m, args: (args[0].float(),))
            layer.norm.register_forward_hook(lambda m, args, out: out.to(torch.bfloat16))
        return model

    compare(two_worlds, build, lambda run: steps_in(run, torch.bfloat16))


@case(stack())
def test_clip_twice_and_log_between(run: Run):
    for _ in range(3):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        for max_norm in (1e-2, 1e-3):
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm))
        run.record("again", torch.nn.utils.get_total_norm([p.grad for p in grads(run)]))
        run.opt.step()
        run.record_grads()
        run.opt.zero_grad()


@case(stack())
def test_clip_by_group(run: Run):
    """A factor per group, another norm for some, by value for others."""
    for _ in range(3):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        for layer in run.model.layers[:3]:
            run.record("norm", torch.nn.utils.clip_grad_norm_(layer.parameters(), 1e-3))
        run.record(
            "inf", torch.nn.utils.clip_grad_norm_(run.model.layers[3].parameters(), 1e-3, norm_type=float("inf"))
        )
        torch.nn.utils.clip_grad_value_(run.model.layers[3].parameters(), 1e-4)
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_another_backward_after_clipping(run: Run):
    """What was clipped is in the sum as it was clipped."""
    for _ in range(2):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        run.model(run.data(4, WIDTH)).square().mean().backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_step_twice_with_one_gradient(run: Run):
    clipped_steps(run, 1, max_norm=1e-3)
    run.model(run.data(4, WIDTH)).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
    run.opt.step()
    run.opt.step()
    run.record_grads()


@case(stack())
def test_edit_after_clipping(run: Run):
    for _ in range(3):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
        with torch.no_grad():
            run.model.layers[1].up.weight.grad.add_(0.5)
            run.model.layers[2].up.weight.grad = run.model.layers[2].up.weight.grad * 2
            run.model.layers[3].up.weight.grad[0] = 0
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_infinite_gradient(run: Run):
    """The norm is infinite, the factor 0: NaN where the gradient was infinite, as in torch."""
    clipped_steps(run, 2, max_norm=1.0)
    run.model(run.data(4, WIDTH)).square().mean().backward()
    with torch.no_grad():
        run.model.layers[1].up.weight.grad[0, 0] = float("inf")
    run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0))
    run.opt.step()
    with pytest.raises(RuntimeError, match="non-finite"):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, error_if_nonfinite=True)


@pytest.mark.covering(2)
@pytest.mark.parametrize("max_norm", [1e-3, 1e6], ids=["bites", "idle"])
@pytest.mark.parametrize("amid", ["effective_factor", "check_replaced", "spans_of"])
def test_a_signal_handler_amid_a_step_that_looks_at_gradients(amid, max_norm, two_worlds, monkeypatch):
    """The step multiplies gradients as it updates: a handler must not multiply them once more. It is refused by name instead."""
    home = f"funicular.optim.adamw.{amid}"
    original = pkgutil.resolve_name(home)
    refused = []

    def strike(*args, **kwargs):
        result = original(*args, **kwargs)
        signal.raise_signal(signal.SIGUSR1)
        return result

    def script(run: Run) -> None:
        def look(*_):
            for p in run.model.parameters():
                try:
                    p.grad.sum().item()
                except funicular.RuntimeFailure as error:
                    assert error.code == "FN-E106"
                    refused.append(amid)

        before = signal.signal(signal.SIGUSR1, look)
        try:
            for _ in range(3):
                run.model(run.data(4, WIDTH)).square().mean().backward()
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
                with monkeypatch.context() as patch:
                    patch.setattr(home, strike)
                    run.opt.step()
                run.record_grads()
                run.opt.zero_grad()
        finally:
            signal.signal(signal.SIGUSR1, before)

    compare(two_worlds, stack(), script)
    assert refused or amid == "check_replaced"  # before the step has taken any factor


def test_the_known_norms_are_used(host_world, monkeypatch):
    """After the first step clipping neither reads nor writes homed gradients."""

    model = stack()()
    funicular.offload(model, host_world.policy(model))
    opt = funicular.AdamW(model.parameters())
    applied = []

    def spying(original):
        def spy(ref):
            applied.append(ref.factor)
            original(ref)

        return spy

    wrap(monkeypatch, "funicular.gradients.backward.apply_pending", spying)
    for step in range(3):
        model(torch.randn(4, WIDTH, device=host_world.torch_device)).square().mean().backward()
        applied.clear()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert bool(applied) == (step == 0), "the first time nothing was known, later everything is"
        opt.step()
        opt.zero_grad()
    funicular.unwrap(model)


@pytest.mark.parametrize("kept", ["the new one", "both"])
def test_a_gradient_that_is_kept_after_a_clipped_step(kept, two_worlds):
    """It stays an ordinary tensor until the step, which has factors for the others; an older one that is kept stays clipped."""

    def script(run: Run) -> None:
        def keep(p):
            held.append(p.grad)

        run.train(1)
        held: list[torch.Tensor] = []
        for number in range(4):
            weight = run.model.layers[2].up.weight
            handle = weight.register_post_accumulate_grad_hook(keep) if number == 2 else None
            run.model(run.data(4, WIDTH)).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3)
            if number == 1 and kept == "both":
                older = weight.grad
            run.opt.step()
            run.opt.zero_grad()
            if handle is not None:
                handle.remove()
        run.record("held", held)
        if kept == "both":
            run.record("older", older)

    compare(two_worlds, stack(), script)
