"""``optimizer.state`` is a dictionary of dictionaries, as in torch, in every use: each beside ``torch.optim.AdamW``."""

import copy
import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_torch_adamw import close
from torch import nn

import funicular
from models import Decoder, Stack
from optimizer_uses import USES, WIDE, Side
from twin import Run, World, compare


@pytest.fixture(params=["ordinary", "host", "nvme"])
def wrap(request: pytest.FixtureRequest, disk: str) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Leave a model ordinary, or offload it: all in host memory, or all on disk. What is in torch's states can be shown to NumPy."""
    tier = "host" if request.param == "ordinary" else request.param
    world = World("host", (disk,), tier, tier)
    yield (lambda m: m) if request.param == "ordinary" else lambda m: funicular.offload(m, world.policy(m, 2))
    gc.collect()


@pytest.mark.covering(1, times=2)
@pytest.mark.parametrize("use", USES)
def test_as_in_torch(use: str, wrap: Callable[[nn.Module], nn.Module]):
    """Losses, weights and states within 1e-6 of those of ``torch.optim.AdamW``."""
    sides = [Side(torch.optim.AdamW, lambda model: model), Side(funicular.AdamW, wrap)]
    for side in sides:
        USES[use](side)
    plain, ours = sides
    assert len(plain.losses) == len(ours.losses)
    assert close(torch.tensor(plain.losses), torch.tensor(ours.losses)), (plain.losses, ours.losses)
    for i, (p, q) in enumerate(zip(plain.params(), ours.params(), strict=True)):
        assert close(p.detach(), q.detach()), i
        assert set(plain.opt.state[p]) == set(ours.opt.state[q])
        assert float(plain.opt.state[p]["step"]) == float(ours.opt.state[q]["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert close(plain.opt.state[p][name], ours.opt.state[q][name], 1e-5), (i, name)


def test_the_comparison_can_fail(host_world: World):
    sides = [Side(torch.optim.AdamW, lambda model: model), Side(funicular.AdamW, lambda model: model)]
    for side, factor in zip(sides, (0.5, 0.5001), strict=True):
        side.each(lambda s, factor=factor: s["exp_avg"].mul_(factor))
    assert not close(torch.tensor(sides[0].losses), torch.tensor(sides[1].losses))


Hook = Callable[..., Any]


@pytest.mark.parametrize("offloaded", [False, True])
def test_hooks(offloaded: bool, host_world: World):
    """The order of all hooks, what they see, and the use of what they return are torch's."""

    def script(kind: type, wrap: Callable[[nn.Module], nn.Module]) -> tuple[list[Any], Side]:
        side, calls = Side(kind, wrap), []

        def note(name: str, what: Callable[..., Any] = lambda *_: None) -> Hook:
            def hook(*args: Any) -> Any:
                seen = args[1] if len(args) == 2 else None
                keys = sorted(map(str, seen["state"][0])) if seen and 0 in seen.get("state", {}) else None
                calls.append((name, keys, None if seen is None else sorted(seen)))
                return what(*args)

            return hook

        def doubled(opt: Any, packed: dict[str, Any]) -> dict[str, Any]:
            state = {k: {**s, "exp_avg": s["exp_avg"] * 2, "mark": k} for k, s in packed["state"].items()}
            return {**packed, "state": state, "more": 1}

        def halved(opt: Any, packed: dict[str, Any]) -> None:
            packed["state"] = {k: {**s, "exp_avg": s["exp_avg"] * 0.25} for k, s in packed["state"].items()}

        opt = side.opt
        opt.register_state_dict_pre_hook(note("state pre"))
        opt.register_state_dict_post_hook(note("state post", doubled))
        opt.register_state_dict_post_hook(note("state post first"), prepend=True)
        opt.register_load_state_dict_pre_hook(note("load pre", halved))
        opt.register_load_state_dict_pre_hook(note("load pre first"), prepend=True)
        opt.register_load_state_dict_post_hook(note("load post"))
        opt.register_step_pre_hook(note("step pre"))
        opt.register_step_post_hook(note("step post"))
        side.go(2)
        saved = opt.state_dict()
        calls.append(sorted(saved))
        opt.load_state_dict(saved)
        calls.append([float(opt.state[p]["mark"]) for p in side.params()])
        side.go(2)
        return calls, side

    calls, plain = script(torch.optim.AdamW, lambda m: m)
    wrap = (
        (lambda m: funicular.offload(m, dataclasses.replace(host_world, device="host").policy(m)))
        if offloaded
        else None
    )
    ours_calls, ours = script(funicular.AdamW, wrap or (lambda m: m))
    assert calls == ours_calls
    assert close(torch.tensor(plain.losses), torch.tensor(ours.losses))


def negative(state: Any) -> None:
    state["step"] = torch.tensor(-1.0)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda s: s.__setitem__("exp_avg", torch.zeros(2, 2)), "'exp_avg' has the shape"),
    "type": (lambda s: s.__setitem__("exp_avg_sq", s["exp_avg_sq"].long()), "'exp_avg_sq' is of torch.int64"),
    "double": (lambda s: s.__setitem__("exp_avg", s["exp_avg"].double()), "'exp_avg' is of torch.float64"),
    "device": (lambda s: s.__setitem__("exp_avg", s["exp_avg"].to("meta")), "'exp_avg' is a .* on meta"),
    "removed": (lambda s: s.pop("exp_avg"), "'exp_avg' was removed"),
    "no step": (lambda s: s.pop("step"), "'step' was removed"),
    "fraction": (lambda s: s["step"].fill_(1.5), "'step' is 1.5"),
    "negative": (negative, "'step' is -1"),
    "rebound": (lambda s: setattr(s["exp_avg"], "data", torch.zeros(7)), "'exp_avg' has the shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_unusable_states(wrong: str, wrap: Callable[[nn.Module], nn.Module]):
    """Named, with the parameter and the key, and nothing is touched; put right, training goes on."""
    edit, said = WRONG[wrong]
    side = Side(funicular.AdamW, wrap)
    side.go(2)
    third = side.params()[2]
    kept = copy.deepcopy(side.opt.state[third])
    edit(side.opt.state[third])
    side.loss().backward()
    before = [p.detach().clone() for p in side.params()]
    with pytest.raises(funicular.UsageError, match=f"FN-E130.*('1.weight'|parameter 2 of group 0).*{said}"):
        side.opt.step()
    assert all(torch.equal(a, b.detach()) for a, b in zip(before, side.params(), strict=True))
    assert all(float(side.opt.state[p]["step"]) == 2 for p in side.params() if p is not third)
    side.opt.state[third] = kept
    side.go(2)
    assert {float(side.opt.state[p]["step"]) for p in side.params()} == {4.0}


@pytest.mark.parametrize("given", [{"exp_avg": 1}, {"step": 3}, {"momentum_buffer": 1, "exp_avg": 2}, [1, 2]], ids=str)
def test_unusable_dictionaries(given: Any, wrap: Callable[[nn.Module], nn.Module]):
    side = Side(funicular.AdamW, wrap)
    side.go(1)
    side.opt.state[side.params()[3]] = given
    side.loss().backward()
    with pytest.raises(funicular.UsageError, match="FN-E130"):
        side.opt.step()
    side.opt.state.pop(side.params()[3])
    side.go(1)


def test_assigned_to_what_cannot_be_kept(wrap: Callable[[nn.Module], nn.Module]):
    """What is no dense tensor is refused where it is assigned."""
    side = Side(funicular.AdamW, wrap)
    side.go(1)
    for p in (side.params()[0], side.extra):
        with pytest.raises(funicular.UsageError, match="FN-E130.*'exp_avg' is a torch.sparse_coo"):
            side.opt.state[p]["exp_avg"] = torch.zeros(p.shape).to_sparse()
        with pytest.raises(funicular.UsageError, match="FN-E130.*'exp_avg' is a float"):
            side.opt.state[p]["exp_avg"] = 1.0
    side.go(1)


def test_state_dicts_that_do_not_fit(wrap: Callable[[nn.Module], nn.Module]):
    """Refused before anything is touched."""
    side = Side(funicular.AdamW, wrap)
    side.go(2)
    saved = side.opt.state_dict()
    other = copy.deepcopy(saved)
    other["state"][1]["exp_avg"] = torch.zeros(3)
    options = copy.deepcopy(saved)
    options["param_groups"][0]["amsgrad"] = True
    options["param_groups"][0]["lr"] = 1.0
    for wrong, code in ((other, "FN-E130"), (options, "FN-E117")):
        with pytest.raises(funicular.UsageError, match=code):
            side.opt.load_state_dict(wrong)
    again = side.opt.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    for key, states in saved["state"].items():
        assert all(torch.equal(value, again["state"][key][name]) for name, value in states.items())
    side.go(1)


def test_groups_with_unsupported_options(host_world: World):
    side = Side(funicular.AdamW, lambda model: model)
    side.opt.param_groups[1]["amsgrad"] = True
    side.loss().backward()
    with pytest.raises(funicular.UsageError, match="FN-E117.*amsgrad"):
        side.opt.step()
    side.opt.param_groups[1]["amsgrad"] = False
    side.opt.step()


def test_parameters_of_other_types(host_world: World):
    """Of a type that has no arithmetic here: named, before the others are stepped."""
    side = Side(funicular.AdamW, lambda model: model)
    odd = nn.Parameter(torch.ones(2, dtype=torch.float64))
    side.opt.add_param_group({"params": [odd]})
    (side.model(torch.ones(2, WIDE)).sum() + odd.sum()).backward()
    with pytest.raises(funicular.UsageError, match="FN-E112.*parameter 0 of group 2.*float64"):
        side.opt.step()
    assert len(side.opt.state) == 0


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["assigned", "copied", "without master", "step zeroed"])
def test_masters(how: str, dtype: torch.dtype, two_worlds: World):
    """With their masters, 16-bit weights go on with the bits that they would have had; without, from the weights."""

    def script(run: Run) -> None:
        run.train(2)
        for p in run.model.parameters():
            state = run.opt.state[p]
            if how == "step zeroed":
                state["step"] = 0 if not run.offloaded else torch.tensor(0.0)
            elif how == "without master" and run.offloaded:
                run.opt.state[p] = {k: v.clone() for k, v in state.items() if k != "master"}
            elif how == "without master":
                run.opt._seen[p] = (-1, p.detach().clone())
            elif run.offloaded:
                run.opt.state[p] = copy.deepcopy(state) if how == "copied" else {k: v.clone() for k, v in state.items()}
        run.train(2)

    compare(two_worlds, lambda: Decoder(dtype=dtype, dropout=0.0), script)


def test_a_master_of_another_weight(host_world: World):
    """States of one fp16 weight given to another: the weight stays what it is."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack().half())
    run.opt = run.adamw(lr=0.0, weight_decay=0.0)
    x = run.data(4, run.model.width, dtype=torch.float16)
    for _ in range(2):
        run.model(x).float().square().mean().backward()
        a, b = run.model.layers[0].up.weight, run.model.layers[1].up.weight
        before = [a.detach().clone(), b.detach().clone()]
        run.opt.step()
        run.opt.zero_grad()
        run.opt.state[b] = {k: v.clone() for k, v in run.opt.state[a].items()}
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])
    run.model(x).float().square().mean().backward()
    run.opt.step()
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_edits_after_unwrap(dtype: torch.dtype, host_world: World):
    """A weight edited between ``unwrap`` and the next step starts its master anew."""

    def script(run: Run) -> None:
        run.train(2)
        if run.offloaded:
            funicular.unwrap(run.model)
        with torch.no_grad():
            run.model.layers[1].up.weight.mul_(1.25)
        run.train(2)

    compare(host_world, lambda: Decoder(dtype=dtype, dropout=0.0), script)


def share(run: Run, how: str) -> None:
    """Give two parameters, in two units of an offloaded model, states in common, as torch allows."""
    a, b = run.model.layers[0].up.weight, run.model.layers[1].up.weight
    state = run.opt.state
    if how == "object":
        state[b] = state[a]
    elif how == "dictionary":
        state[a] = state[b] = {key: value.clone() for key, value in state[a].items()}
    elif how == "entries":
        state[b] = dict(state[a])
    elif how == "loaded":
        saved = run.opt.state_dict()
        numbers = {id(p): i for i, p in enumerate(run.model.parameters())}
        saved["state"][numbers[id(b)]]["exp_avg"] = saved["state"][numbers[id(a)]]["exp_avg"]
        run.opt.load_state_dict(saved)
    else:
        state[b][how] = state[a][how]


@pytest.mark.covering(2)
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("how", ["object", "dictionary", "entries", "exp_avg", "step", "loaded"])
def test_states_in_common(how: str, offloaded: bool, two_worlds: World):
    """torch would update them twice a step. Refused by name before anything changes; with a clone the parameters go on."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack()) if offloaded else Stack()
    run.opt = run.adamw()
    run.train(2, look=False)
    run.model(run.data(4, run.model.width)).square().mean().backward()
    weights = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(funicular.UsageError, match="FN-E130.*too, and each needs its own"):
        share(run, how)
        run.opt.step()
    assert all(torch.equal(p, w) for p, w in zip(run.model.parameters(), weights, strict=True))
    assert int(run.opt.state[run.model.inp.weight]["step"]) == 2
    a, b = run.model.layers[0].up.weight, run.model.layers[1].up.weight
    run.opt.state[b] = {key: value.clone() for key, value in run.opt.state[a].items()}
    run.opt.state[a] = {key: value.clone() for key, value in run.opt.state[a].items()}
    run.opt.step()
    assert int(run.opt.state[b]["step"]) == 3


def test_own_entries_leave_with_unwrap(two_worlds: World):
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    weight = run.model.inp.weight
    run.opt.state[weight]["slow"] = 17
    for _ in range(2):
        run.train(1, look=False)
        funicular.unwrap(run.model)
        assert run.opt.state[weight]["slow"] == 17
        run.wrap(run.model)
        run.train(1, look=False)
        assert run.opt.state[weight]["slow"] == 17


def test_own_entries_are_not_saved(two_worlds: World, tmp_path: Any):
    """Refused by name before anything is written; ordinary dictionaries are states, and are saved."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(2, look=False)
    weight = run.model.inp.weight
    run.opt.state[weight]["slow"] = weight.detach().clone()
    with pytest.raises(funicular.UsageError, match="FN-E408.*'slow'"):
        funicular.save(run.model, run.opt, tmp_path / "c")
    assert not list(tmp_path.iterdir())
    moment = run.opt.state[weight]["exp_avg"].clone()
    run.opt.state[weight] = {"step": torch.tensor(0.0), "exp_avg": moment.clone(), "exp_avg_sq": moment.square()}
    funicular.save(run.model, run.opt, tmp_path / "c")
    run.opt.state[weight]["exp_avg"].zero_()
    funicular.load(tmp_path / "c", run.model, run.opt)
    assert torch.equal(run.opt.state[weight]["exp_avg"], moment)
    assert float(run.opt.state[weight]["step"]) == 0
    run.train(1, look=False)


def test_read_in_inference_mode(two_worlds: World):
    """What was read there is an ordinary state afterwards."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    with torch.inference_mode():
        kept = [run.opt.state[p]["exp_avg"] for p in list(run.model.parameters())[:2]]
    run.train(2, look=False)
    assert all(torch.equal(t, run.opt.state[p]["exp_avg"]) for t, p in zip(kept, run.model.parameters()))


def test_states_that_nobody_reads_cost_nothing(two_worlds: World):
    """No tensor is fetched, digested or kept by a step of its own."""
    run = Run(two_worlds, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(2, look=False)
    for p in run.model.parameters():
        run.opt.state[p]["exp_avg"].sum()
    run.train(1, look=False)
    for p in run.model.parameters():
        states = run.opt.state[p]
        assert not states._fetched
        assert not states._tensors
        assert states._step is None
