"""Units that live on the compute device: ordinary parameters beside paged ones, the same bits."""

import copy

import pytest
import torch
from torch import nn

import funicular
from funicular import testing
from models import CUDA, WIDTH, stack
from mutations import wrap
from twin import Run, compare

AUTO = {"params": {"tier": "auto"}, "optimizer": {"tier": "auto"}}
#: what the compute tier holds: all units (each of their tensors counts for 2 MiB at least); some beside an ample ring
ROOM = {"all": "256MiB", "some": "64MiB"} if CUDA else {"all": "64MiB", "some": "20MiB"}


def is_paged(p: nn.Parameter) -> bool:
    return testing.inspect_parameter(p) is not None


def train(run: Run) -> None:
    run.train(3)


def clip(run: Run) -> None:
    for step in range(4):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3 if step % 2 else 1e3))
        run.opt.step()
        run.opt.zero_grad()


def edits_and_states(run: Run) -> None:
    run.train(2)
    with torch.no_grad():
        run.model.layers[0].up.weight.mul_(1.25)
        run.model.layers[5].up.weight.mul_(1.25)
    run.opt.state[run.model.layers[0].up.weight]["exp_avg"].mul_(0.5)
    run.train(1)
    saved = copy.deepcopy((run.model.state_dict(), run.opt.state_dict()))
    run.train(1)
    run.model.load_state_dict(saved[0])
    run.opt.load_state_dict(saved[1])
    run.train(2)


def accumulate_and_freeze(run: Run) -> None:
    for step in range(3):
        run.model.layers[0].up.weight.requires_grad_(step != 1)
        for _ in range(2):
            run.model(run.data(4, WIDTH)).square().mean().backward()
        run.opt.step()
        run.opt.zero_grad()


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("script", [train, clip, edits_and_states, accumulate_and_freeze], ids=lambda s: s.__name__)
def test_same_bits(two_worlds, room, script):
    compare(two_worlds, stack(depth=6), script, budget={"hbm": ROOM[room]}, **AUTO)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(host_world, dtype):
    def script(run: Run) -> None:
        for _ in range(4):
            run.model(run.data(4, WIDTH).to(dtype)).float().square().mean().backward()
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2))
            run.opt.step()
            run.opt.zero_grad()

    compare(host_world, lambda: stack(depth=6)().to(dtype), script, budget={"hbm": ROOM["some"]}, **AUTO)


def offloaded(world, hbm: str, **sections) -> nn.Module:
    model = stack(depth=6)()
    return funicular.offload(model, world.policy(model, budget={"hbm": hbm}, **{**AUTO, **sections}))


def test_what_fits_is_left_alone(host_world):
    model = offloaded(host_world, ROOM["all"])
    assert not any(map(is_paged, model.parameters()))
    assert all(type(p) is nn.Parameter for p in model.parameters())
    budgets = funicular.stats(model).budgets
    assert 0 < budgets["hbm"].peak <= budgets["hbm"].limit
    funicular.unwrap(model)


def test_the_first_units_are_resident(host_world):
    model = offloaded(host_world, ROOM["some"])
    paged = [is_paged(p) for p in model.parameters()]
    assert any(paged)
    assert not all(paged)
    assert paged == sorted(paged), "residents come first in forward order"
    funicular.unwrap(model)
    assert not any(map(is_paged, model.parameters()))
    offloaded_again = funicular.offload(model, host_world.policy(model))
    assert all(map(is_paged, offloaded_again.parameters()))
    funicular.unwrap(model)


def test_by_name(host_world):
    """`optimizer.tier = "hbm"` for units that are named."""
    override = [{"match": "layers.4*", "optimizer": "hbm", "params": "auto"}]
    sections = {"params": {"tier": "host"}, "optimizer": {"tier": "host"}, "override": override}
    model = offloaded(host_world, ROOM["some"], **sections)
    assert {n.split(".")[1] for n, p in model.named_parameters() if not is_paged(p)} == {"4"}
    funicular.unwrap(model)
    compare(host_world, stack(depth=6), train, budget={"hbm": ROOM["some"]}, **sections)


def test_belongs_to_one_model_only(host_world):
    model = offloaded(host_world, ROOM["all"])
    outer = nn.Sequential(model.layers[0], nn.Linear(WIDTH, WIDTH))
    with pytest.raises(funicular.UsageError, match="FN-E110"):
        funicular.offload(outer, host_world.policy(outer))
    funicular.unwrap(model)


def test_a_copy_is_ordinary(host_world):
    model = offloaded(host_world, ROOM["all"])
    twin = copy.deepcopy(model)
    assert not any(testing.is_resident(p) for p in twin.parameters())
    opt = funicular.AdamW(twin.parameters(), lr=1e-3)
    twin(torch.randn(4, WIDTH, device=host_world.torch_device)).sum().backward()
    opt.step()
    funicular.unwrap(model)


def test_clipping_leaves_paged_gradients_where_they_are(host_world, monkeypatch):
    """Beside residents, whose gradients torch multiplies, the factor of paged ones stays pending."""
    model = offloaded(host_world, ROOM["some"])
    opt = funicular.AdamW(model.parameters())
    touched = []
    wrap(
        monkeypatch,
        "funicular.windows.session.Session.access_grads",
        lambda original: lambda self, refs: (touched.extend(refs), original(self, refs)),
    )
    for step in range(3):
        model(torch.randn(4, WIDTH, device=host_world.torch_device)).square().mean().backward()
        touched.clear()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, foreach=True)
        assert bool(touched) == (step == 0)
        opt.step()
        opt.zero_grad()
    funicular.unwrap(model)


def test_conversions_reach_residents(host_world):
    """Parameters of resident units are ordinary ones: `.half()` converts them, and only paged ones refuse it."""
    model = offloaded(host_world, ROOM["some"])
    paged = [is_paged(p) for p in model.parameters()]
    with pytest.raises(funicular.UsageError, match="FN-E115"):
        model.half()
    kinds = [torch.float32 if one else torch.float16 for one in paged]
    assert [p.dtype for p in model.parameters()] == kinds
    model.float()
    funicular.unwrap(model)
    model = offloaded(host_world, ROOM["all"])
    model.half()
    assert all(p.dtype == torch.float16 for p in model.parameters())
    funicular.unwrap(model)
