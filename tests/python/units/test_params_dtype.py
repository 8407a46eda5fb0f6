"""``params.dtype``: parameters are converted when the model is offloaded, as ``.to(dtype)`` would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import funicular
from models import Decoder, Stack
from twin import Run, World, compare

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """What the key stands for, in plain PyTorch."""
    for p in model.parameters():
        grad, p.grad = p.grad, None
        p.data = p.data.to(dtype)
        p.grad = None if grad is None else grad.to(dtype)
    return model


@pytest.mark.covering(2)
@pytest.mark.parametrize("own", FORMATS)
@pytest.mark.parametrize("asked", FORMATS)
def test_trains_as_a_converted_model(asked: str, own: str, two_worlds: World) -> None:
    def script(run: Run) -> None:
        model = Decoder(dropout=0.0, dtype=FORMATS[own])
        model.layers[1].up.weight.requires_grad_(False)
        if run.offloaded:
            run.model = run.wrap(model, params={"dtype": asked})
            assert {p.dtype for p in run.model.parameters()} == {FORMATS[asked]}
        else:
            run.model = run.wrap(converted(model, FORMATS[asked]))
        run.opt = run.adamw()
        run.train(3)

    compare(two_worlds, None, script)


def test_gradients_come_along_and_buffers_do_not(host_world: World) -> None:
    """A gradient that is there already counts in the next step; so does an optimizer that was made before."""

    def script(run: Run) -> None:
        run.model = Stack()
        run.model.register_buffer("scale", torch.full((1,), 0.1))
        run.model.to(run.device)
        run.opt = run.adamw()
        run.model(run.data(4, run.model.width)).square().mean().backward()
        if run.offloaded:
            run.wrap(run.model, params={"dtype": "bfloat16"})
        else:
            converted(run.model, torch.bfloat16)
        assert run.model.scale.dtype == torch.float32
        run.record_grads()
        run.opt.step()
        run.record_weights()

    compare(host_world, None, script)


def test_keep_is_what_nothing_says(host_world: World) -> None:
    model = Stack()
    before = [(p.dtype, p.detach().clone()) for p in model.parameters()]
    funicular.offload(model, host_world.policy(model, params={"dtype": "keep"}))
    for (dtype, value), p in zip(before, model.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p.detach().cpu(), value)


def test_weights_from_files(host_world: World, tmp_path: Path) -> None:
    """From a directory into a model without weights: in the format that is asked for."""
    torch.manual_seed(3)
    source = Stack()
    expected = [p.detach().bfloat16() for p in source.parameters()]
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Stack()
    funicular.offload(model, host_world.policy(Stack(), params={"dtype": "bfloat16"}), checkpoint=tmp_path)
    for p, value in zip(model.parameters(), expected, strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.detach().cpu(), value)


def test_a_budget_is_asked_for_what_is_converted(host_world: World) -> None:
    """Refused before anything is touched, or accepted, by the bytes of the new format."""
    model = Stack()
    policy = host_world.policy(model.bfloat16())
    model.float()
    with pytest.raises(funicular.BudgetError, match="FN-E20"):
        funicular.offload(model, {**policy, "budget": {**policy["budget"], "hbm": "4KiB"}})
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    funicular.offload(model, {**policy, "params": {"tier": "host", "dtype": "bfloat16"}})


def test_a_later_failure_gives_the_format_back(host_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was rounded: a model that is offloaded again goes on."""

    def fails(*_: object) -> None:
        raise RuntimeError("as if")

    model = Stack()
    rounded = [p.detach().bfloat16().float() for p in model.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr("funicular.offloading._move_buffers", fails)
        with pytest.raises(RuntimeError, match="as if"):
            funicular.offload(model, host_world.policy(model, params={"dtype": "bfloat16"}))
    for p, value in zip(model.parameters(), rounded, strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p.detach().cpu(), value)
    funicular.offload(model, host_world.policy(model))


def test_plans_count_it() -> None:
    """Half the bytes; ``--dtype`` goes first."""

    def params(*more: str) -> int:
        shape = ["--params", "1B", "--layers", "8", "--gpu", "24GB", "--ram", "64GB", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "funicular", "plan", *shape, *more], capture_output=True, text=True, check=True
        )
        host = next(tier for tier in json.loads(done.stdout)["tiers"] if tier["tier"] == "host")
        return int(host["steady"])

    assert params("--set", 'params.dtype="float32"') == params("--dtype", "fp32") > params()
    assert params("--set", 'params.dtype="float32"', "--dtype", "bf16") == params()
