"""Updates whose weights are made first and whose states follow beside forward and backward: the same bits for all that may look meanwhile."""

import copy

import pytest
import torch

import funicular
from models import WIDTH, stack
from step_scripts import SCRIPTS, clipped_always, read_between
from twin import Run, compare

#: with a spare copy the old weights are kept until the states are made; without one, weights and masters are made in place
PLACES = pytest.mark.parametrize("spare", ["32MiB", "0B"], ids=["beside", "in_place"])


def later(spare: str, delay: int = 3, faults: str = "") -> dict[str, dict[str, str]]:
    """Sections of a policy under which states follow in every step, each unit's so many milliseconds late."""
    return {"optimizer": {"spare": spare}, "debug": {"faults": f"states:delay={delay}ms{faults}"}}


@PLACES
@pytest.mark.covering(1)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_same_bits(host_world, script, spare):
    compare(host_world, stack(), script, **later(spare))


@PLACES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(host_world, dtype, spare):
    def script(run: Run) -> None:
        for step in range(6):
            run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e3 if step == 3 else 1e-2))
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, lambda: stack()().to(dtype), script, **later(spare))


@PLACES
@pytest.mark.parametrize("script", [clipped_always, read_between], ids=lambda s: s.__name__)
def test_where_something_is_frozen(host_world, script, spare):
    """Such a unit's weights are made in place, also where it has a spare copy."""

    def build():
        model = stack()()
        for layer in model.layers[1:4]:
            layer.down.weight.requires_grad_(False)
        return model

    compare(host_world, build, script, **later(spare))


@PLACES
def test_homes_that_are_late(host_world, spare):
    """A copy home waits for states that are made from the weights which it overwrites."""
    compare(host_world, stack(), read_between, **later(spare, 10, ",home:delay=5ms"))


def trained(world, spare: str, steps: int = 4, delay: int = 3):
    model = stack()()
    funicular.offload(model, world.policy(model, **later(spare, delay)))
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(torch.randn(4, WIDTH, device=world.torch_device)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        opt.step()
        opt.zero_grad()
    return model, opt


@PLACES
def test_it_is_used(host_world, spare):
    model, _ = trained(host_world, spare)
    stats = funicular.stats(model)
    assert stats.ahead.weights_first >= 3 * len(model.layers)
    assert stats.ahead.used == 0
    assert "weights first" in str(stats)


@PLACES
def test_unwrapped_amid_it(host_world, spare):
    def script(run: Run) -> None:
        clipped_always(run)
        if run.offloaded:
            funicular.unwrap(run.model)
        run.record("weights", [p.detach().clone() for p in run.model.parameters()])
        states = [run.opt.state[p] for p in run.model.parameters()]
        run.record("states", [s[k].clone().cpu() for s in states for k in ("exp_avg", "exp_avg_sq")])

    compare(host_world, stack(), script, **later(spare, 10))


@PLACES
def test_saved_amid_it(host_world, spare, tmp_path):
    """What is saved is the state at the call, states that had yet to follow included."""

    def script(run: Run) -> None:
        clipped_always(run)
        if run.offloaded:
            save = funicular.save(run.model, run.opt, tmp_path / "a", wait=False)
            clipped_always(run)
            save.wait()
            funicular.load(tmp_path / "a", run.model, run.opt, random=False)
        else:
            kept = copy.deepcopy((run.model.state_dict(), run.opt.state_dict()))
            clipped_always(run)
            run.model.load_state_dict(kept[0])
            run.opt.load_state_dict(kept[1])
        clipped_always(run)

    compare(host_world, stack(), script, **later(spare, 10))
