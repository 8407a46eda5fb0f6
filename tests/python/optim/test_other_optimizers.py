"""Optimizers of others over offloaded models: their states, their budgets, and parameters that no model has any more."""

import copy
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funicular
from models import WIDTH, Stack
from mutations import wrap
from twin import Run, World

BOTH = [funicular.AdamW, torch.optim.AdamW]


def data(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(4, WIDTH, dtype=dtype)


def step(model: nn.Module, opt: Any, dtype: torch.dtype = torch.float32) -> None:
    model(data(dtype).to(next(model.parameters()).device)).float().square().mean().backward()
    opt.step()
    opt.zero_grad()


def warnings(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "FN-W130" in r.getMessage()]


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["adamw", "momentum", "sgd"])
def test_states_beside_the_budgets(kind: str, two_worlds: World, caplog: Any):
    """Told once for each optimizer, with the bytes that no budget counts and those that stay unused."""
    model = Stack()
    size = sum(p.numel() for p in model.parameters())
    funicular.offload(model, two_worlds.policy(model))
    makes = {
        "adamw": lambda: torch.optim.AdamW(model.parameters()),
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=1e-3),
    }
    bytes_of_states = {"adamw": 8 * size + 4 * len(list(model.parameters())), "momentum": 4 * size, "sgd": 0}[kind]
    with caplog.at_level(logging.WARNING, "funicular"):
        for count in (1, 2):
            opt = makes[kind]()
            for _ in range(3):
                step(model, opt)
            assert len(warnings(caplog)) == count
    said = warnings(caplog)[0]
    shown = f"{bytes_of_states / 1024:.2f} KiB" if bytes_of_states < 1 << 20 else f"{bytes_of_states / 2**20:.2f} MiB"
    assert ("0 B" if kind == "sgd" else shown) in said
    assert f"{two_worlds.optimizer!r}" in said
    assert "funicular.AdamW" in said


def test_nothing_is_told_of_others(host_world: World, caplog: Any):
    """Of this project's own, and of optimizers over ordinary parameters."""
    model = Stack()
    funicular.offload(model, host_world.policy(model))
    plain = Stack()
    with caplog.at_level(logging.WARNING, "funicular"):
        step(model, funicular.AdamW(model.parameters()))
        step(plain, torch.optim.AdamW(plain.parameters()))
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", BOTH)
def test_made_before_the_weights(kind: type, two_worlds: World, tmp_path: Path):
    """An optimizer over a model on the meta device trains it once its weights have come, as one that was made after."""
    torch.manual_seed(2)
    source = Stack()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    found = []
    for before in (True, False):
        with torch.device("meta"):
            model = Stack()
        model.inp.weight.mark = 5
        opt = kind(model.parameters(), lr=1e-2) if before else None
        params = list(model.parameters())
        funicular.offload(model, two_worlds.policy(Stack()), checkpoint=tmp_path)
        assert all(p is q for p, q in zip(params, model.parameters(), strict=True))
        assert model.inp.weight.mark == 5
        opt = opt or kind(model.parameters(), lr=1e-2)
        for _ in range(3):
            step(model, opt)
        assert funicular.stats(model).steps == (3 if kind is funicular.AdamW else 0)
        assert {float(opt.state[p]["step"]) for p in model.parameters()} == {3.0}
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0].cpu(), source.inp.weight.detach())


def test_a_failed_load_leaves_meta_parameters(host_world: World, tmp_path: Path):
    """The same objects on the meta device again, for the next try."""
    torch.manual_seed(2)
    save_file(Stack().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Stack()
    params = list(model.parameters())
    opt = funicular.AdamW(params)
    with pytest.raises(funicular.BudgetError, match="FN-E20"):
        funicular.offload(model, host_world.policy(Stack(), budget={"host": "4KiB"}), checkpoint=tmp_path)
    assert all(p is q and p.is_meta for p, q in zip(params, model.parameters(), strict=True))
    funicular.offload(model, host_world.policy(Stack()), checkpoint=tmp_path)
    step(model, opt)
    assert funicular.stats(model).steps == 1


@pytest.mark.parametrize("kind", BOTH)
def test_meta_parameters(kind: type, host_world: World):
    """A step over parameters that stayed behind on the meta device is an error, and not nothing."""
    with torch.device("meta"):
        model = Stack()
    opt = kind(model.parameters())
    model.to_empty(device="cpu")  # torch makes new parameters
    for p in model.parameters():
        nn.init.ones_(p)
    funicular.offload(model, host_world.policy(model))
    model(data().to(next(model.parameters()).device)).mean().backward()
    with pytest.raises(funicular.UsageError, match=r"FN-E131 AdamW.*parameter 0 of group 0"):
        opt.step()


def test_states_loaded_before_the_weights(host_world: World, tmp_path: Path):
    """A state_dict loaded while the model is on the meta device is there when the weights are."""
    torch.manual_seed(2)
    plain = Stack()
    first = funicular.AdamW(plain.parameters(), lr=1e-2)
    step(plain, first)
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Stack()
    opt = funicular.AdamW(model.parameters(), lr=1e-2)
    opt.load_state_dict(first.state_dict())
    funicular.offload(model, host_world.policy(Stack()), checkpoint=tmp_path)
    for _ in range(2):
        step(model, opt)
    assert {float(opt.state[p]["step"]) for p in model.parameters()} == {3.0}
    if host_world.device == "host":
        for _ in range(2):
            step(plain, first)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


ADAMS = {
    "foreach": {"foreach": True},
    "for each": {"foreach": False},
    "fused": {"fused": True},
    "maximize": {"maximize": True},
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", ADAMS)
def test_torch_adamw_saved_and_loaded(options: str, dtype: torch.dtype, two_worlds: World, tmp_path: Path):
    """Its states come back in the types that torch keeps, and it goes on with the same bits."""
    torch.manual_seed(2)
    model = Stack().to(dtype)
    funicular.offload(model, two_worlds.policy(model))
    eps = 1e-3 if dtype == torch.float16 else 1e-8  # fp16 has nothing smaller, and torch keeps the states in it
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps, **ADAMS[options])
    for _ in range(2):
        step(model, opt, dtype)
    kept = copy.deepcopy(opt.state_dict()["state"])
    funicular.save(model, opt, tmp_path / "c")
    step(model, opt, dtype)
    after = [p.detach().clone() for p in model.parameters()]
    funicular.load(tmp_path / "c", model, opt)
    for key, states in opt.state_dict()["state"].items():
        assert set(states) == set(kept[key])
        for name, value in states.items():
            assert (value.dtype, value.device) == (kept[key][name].dtype, kept[key][name].device)
            assert torch.equal(value, kept[key][name])
    step(model, opt, dtype)
    assert all(torch.equal(a, p) for a, p in zip(after, model.parameters(), strict=True))


KINDS = {
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
    "amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params),
    "rmsprop": lambda params: torch.optim.RMSprop(params),
    "adafactor": lambda params: getattr(torch.optim, "Adafactor", torch.optim.Adagrad)(params),
}


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_cannot_be_saved(kind: str, host_world: World, tmp_path: Path):
    """Other optimizers train; their states are refused by name before anything is written, and go by torch's own way."""
    model = Stack().bfloat16()
    funicular.offload(model, host_world.policy(model))
    opt = KINDS[kind](model.parameters())
    step(model, opt, torch.bfloat16)
    with pytest.raises(funicular.UsageError, match=f"FN-E408.*{type(opt).__name__}"):
        funicular.save(model, opt, tmp_path / "c")
    assert not list(tmp_path.iterdir())
    again = KINDS[kind](model.parameters())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(model, again, torch.bfloat16)


def test_states_for_another_kind_of_optimizer(host_world: World, tmp_path: Path):
    """States of AdamW are not loaded into an optimizer that would not use them."""
    model = Stack()
    funicular.offload(model, host_world.policy(model))
    opt = funicular.AdamW(model.parameters())
    step(model, opt)
    funicular.save(model, opt, tmp_path / "c")
    with pytest.raises(funicular.UsageError, match="FN-E407.*SGD"):
        funicular.load(tmp_path / "c", model, torch.optim.SGD(model.parameters(), lr=1.0))
    funicular.load(tmp_path / "c", model, torch.optim.Adam(model.parameters()))


def test_two_models_are_two_steps(host_world: World, monkeypatch: pytest.MonkeyPatch):
    """One AdamW over two offloaded models: interrupted in between, the first has stepped and the second has not, each as a whole."""
    models = [Stack(depth=2), Stack(depth=2)]
    for model in models:
        funicular.offload(model, host_world.policy(model))
    opt = funicular.AdamW([p for model in models for p in model.parameters()])
    for model in models:
        model(data().to(next(model.parameters()).device)).mean().backward()
    before = [[p.detach().clone() for p in model.parameters()] for model in models]
    calls = []

    def struck(go: Callable[[Any], None]) -> Callable[[Any], None]:
        def second(self: Any) -> None:
            calls.append(self)
            if len(calls) == 2:
                raise KeyboardInterrupt
            go(self)

        return second

    wrap(monkeypatch, "funicular.optim.adamw._SessionStep.go", struck)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    stepped = [
        [not torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True) if a.ndim > 1]
        for model, kept in zip(models, before, strict=True)
    ]
    assert all(stepped[0])
    assert not any(stepped[1])
    monkeypatch.undo()
    opt.step()
    counts = [{float(opt.state[p]["step"]) for p in model.parameters()} for model in models]
    assert counts == [{2.0}, {1.0}]
    del models, model, opt
    gc.collect()


def test_one_run_over_both_kinds(host_world: World):
    """States handed from this project's AdamW to torch's and back, over one offloaded model."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = funicular.AdamW(run.model.parameters(), lr=1e-3)
    run.train(2, look=False)
    other = torch.optim.AdamW(run.model.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(run.opt.state_dict()))
    first, run.opt = run.opt, other
    run.train(2, look=False)
    first.load_state_dict(other.state_dict())
    run.opt = first
    run.train(2, look=False)
    assert {float(first.state[p]["step"]) for p in run.model.parameters()} == {6.0}
