"""The judge sees what is broken: each mechanism left out on purpose makes the comparison fail."""

import gc
import pkgutil
import sys
import sysconfig
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import facts
import funicular
from models import Decoder, Stack, stack
from mutations import MUTATIONS, break_
from twin import Mismatch, Run, World, compare

BUILDS = {
    "linear": lambda: Decoder(matmul=False),
    "matmul": lambda: Decoder(matmul=True),
    "tied": lambda: Decoder(matmul=True, tie=True),
    "bf16": lambda: Decoder(matmul=True, dtype=torch.bfloat16),
    "stack": stack(),
}


def backward(run: Run) -> None:
    """One backward: what goes wrong in it shows in the gradients."""
    x = run.model.example(run) if hasattr(run.model, "example") else run.data(4, run.model.width)
    run.model(x).square().mean().backward()
    run.record_grads()


def train(run: Run) -> None:
    """No code looks at gradients: what goes wrong shows in the weights."""
    run.train(2, look=False)


@pytest.mark.covering(2)
@pytest.mark.parametrize("script", [backward, train])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("what", ["skip_backward_reload", "drop_gradient"])
def test_broken(what: str, build: str, script, two_worlds: World):
    compare(two_worlds, BUILDS[build], script)
    with break_(what), pytest.raises(Mismatch):
        compare(two_worlds, BUILDS[build], script)
    compare(two_worlds, BUILDS[build], script)


@pytest.mark.parametrize("what", ["skip_backward_reload", "drop_gradient"])
def test_broken_for_one_of_four(what: str, host_world: World):
    """Only in one micro-batch of an accumulation; later gradients are added in place and need no way down."""
    which = 0 if what == "drop_gradient" else 2

    def script(run: Run) -> None:
        for i in range(4):
            loss = run.model(run.tokens(2, 9))
            if i == which and broken:
                with break_(what):
                    loss.backward()
            else:
                loss.backward()
        run.record_grads()

    broken = False
    compare(host_world, Decoder, script)
    broken = True
    with pytest.raises(Mismatch):
        compare(host_world, Decoder, script)


def test_skipped_reload_is_loud(host_world: World):
    """With poison the stale bytes are NaN, so that a run without a twin notices too."""
    run = Run(host_world, True)
    run.model = run.wrap(Decoder(matmul=True))
    with break_("skip_backward_reload"):
        run.model(run.tokens(2, 9)).backward()
    assert not all(bool(p.grad.isfinite().all()) for p in run.model.parameters())


def test_skipped_reload_is_silent_without_poison(host_world: World):
    """What poison is for: without it the numbers are finite, and wrong."""

    def script(run: Run) -> None:
        backward(run)
        assert all(bool(p.grad.isfinite().all()) for p in run.model.parameters())

    with break_("skip_backward_reload"), pytest.raises(Mismatch):
        compare(host_world, BUILDS["matmul"], script, debug={"poison": False})


class Wide(nn.Module):
    """Two weights: the gradient of the first waits for that of the second on its way down."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Parameter(torch.ones(width, width))
        self.second = nn.Parameter(torch.ones(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.first @ self.second


def last_gradient_entries(run: Run) -> None:
    """Read the end of the last gradient past the guard, as compiled code would, the moment that backward returns."""
    for scale in (1.0, 2.0, 3.0, 4.0):
        run.model(torch.full((1, run.model.width), scale, device=run.device)).sum().backward()
        with torch._C.DisableTorchFunctionSubclass():
            run.record("end", run.model.first.grad[-1, -8:].clone())
        run.model.zero_grad(set_to_none=True)


def test_wrong_gate(host_world: World):
    """Not waiting for the gradients' copies at the end of backward."""
    # Without poison: its digests are read from the device, behind those copies on the same copy engine.
    slow = {"budget": {"host": "1GiB"}, "debug": {"faults": "down:times=50", "poison": False}}
    compare(host_world, Wide, last_gradient_entries, **slow)
    with break_("wrong_gate"), pytest.raises(Mismatch, match="end"):
        compare(host_world, Wide, last_gradient_entries, **slow)


def test_what_failed_is_forgotten(nvme_world: World):
    """A model in the traceback of a failed test keeps its files, which the end of the test would complain of too."""

    def fails() -> None:
        run = Run(nvme_world, True)
        model = run.wrap(Stack())
        model(run.data(4, model.width))
        raise ZeroDivisionError

    def fails_again() -> None:
        try:
            fails()
        except ZeroDivisionError as error:
            raise ValueError("after that") from error

    with pytest.raises(ValueError, match="after that") as caught:
        fails_again()
    assert all(frame.f_locals for frame, _ in traceback.walk_tb(caught.tb))  # as a report looks at them
    gc.collect()
    assert facts.files(nvme_world.paths[0])
    facts.forget_frames(caught.value)
    gc.collect()
    assert not facts.files(nvme_world.paths[0])


def test_no_such_mechanism():
    with pytest.raises(ValueError, match="skip_backward_reload"), break_("everything"):
        pass


@pytest.mark.parametrize("what", MUTATIONS)
def test_what_is_broken_is_mended(what: str):
    def now() -> object:
        return pkgutil.resolve_name(MUTATIONS[what][0])

    before = now()
    with pytest.raises(ZeroDivisionError), break_(what):
        assert now() is MUTATIONS[what][1]
        raise ZeroDivisionError
    assert now() is before


@pytest.mark.parametrize("change", ["weight", "gradient", "buffer", "missing gradient", "extra note", "loss"])
def test_the_judge(change: str, host_world: World):
    """One changed bit, or one missing note, on one side only."""

    def script(run: Run) -> None:
        run.train(2)
        run.model.register_buffer("table", torch.zeros(3, device=run.device))
        run.model(run.data(4, run.model.width)).square().mean().backward()
        p = run.model.layers[2].up.weight
        if not run.offloaded:
            return
        with torch.no_grad():
            if change == "weight":
                p.view(-1)[5] = torch.nextafter(p.view(-1)[5], torch.tensor(9.0, device=p.device))
            elif change == "gradient":
                p.grad.view(-1)[7] = torch.nextafter(p.grad.view(-1)[7], torch.tensor(9.0, device=p.device))
            elif change == "missing gradient":
                p.grad = None
            elif change == "buffer":
                run.model.table[1] = -0.0  # another bit pattern of the same number
            elif change == "extra note":
                run.record("more", 1)
            else:
                run.record("loss", torch.tensor(1.0))

    with pytest.raises(Mismatch):
        compare(host_world, stack(), script)


def test_an_offloaded_model_is_really_paged(host_world: World):
    """The matrix would prove nothing if everything fitted: its budgets hold fewer frames than there are units."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack(depth=12))
    limit = funicular.stats(run.model).budgets["hbm"].limit
    assert limit is not None
    assert limit < sum(p.numel() * p.element_size() for p in run.model.parameters()) * 2 / 3


def test_what_a_test_leaves_on_the_path(monkeypatch: pytest.MonkeyPatch):
    """Folders of the repository; not those of packages in its environment, of which torch's compiler adds some."""
    packages = sysconfig.get_path("purelib")
    monkeypatch.setattr(facts, "_ROOT", Path(packages).parents[2])
    own = str(facts._ROOT / "own")
    monkeypatch.setattr(sys, "path", ["", f"{packages}/setuptools/_vendor", own])
    assert facts.process()["path"] == [own]


def test_what_a_test_leaves_of_torchs_state():
    """It is told of, and the next test has the state as it was."""
    before = facts.process()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    assert facts.process() != before
    facts.restore(before)
    assert facts.process() == before
