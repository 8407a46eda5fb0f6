"""Other libraries that move or replicate a model's weights are refused by name; weights that are frozen too late are told of."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

import funicular
from models import Stack
from twin import Run, World


def test_hooks_of_accelerate(host_world: World):
    """What `device_map` leaves on modules: the attribute `_hf_hook`."""
    model = Stack()
    model.layers[2]._hf_hook = object()
    with pytest.raises(funicular.UsageError, match=r"FN-E140 'layers\.2'.*device_map.*remove_hook_from_module"):
        funicular.offload(model, host_world.policy(model))
    del model.layers[2]._hf_hook
    funicular.unwrap(funicular.offload(model, host_world.policy(model)))


def test_data_parallel(host_world: World):
    model = Stack()
    with pytest.raises(funicular.UsageError, match="FN-E140.*DataParallel.*module in it"):
        funicular.offload(nn.DataParallel(model), host_world.policy(model))
    funicular.offload(model, host_world.policy(model))
    around = nn.DataParallel(nn.Sequential(model))
    with pytest.raises(funicular.UsageError, match="FN-E140.*each GPU"):
        around.replicate(around.module, [0, 1])
    funicular.unwrap(model)


@pytest.mark.parametrize("late", [False, True])
def test_frozen_too_late(late: bool, two_worlds: World, caplog: Any):
    """Told once, with the bytes, in the first forward with gradients."""
    run = Run(two_worlds, True)
    model = Stack()

    def freeze() -> None:
        for layer in model.layers:
            layer.requires_grad_(False)

    if not late:
        freeze()
    run.model = run.wrap(model)
    if late:
        freeze()
    run.opt = run.adamw([p for p in model.parameters() if p.requires_grad])
    with caplog.at_level(logging.WARNING, "funicular"):
        with torch.no_grad():
            model(run.data(4, model.width))
        run.train(2, look=False)
    told = [r.getMessage() for r in caplog.records if "FN-W140" in r.getMessage()]
    assert len(told) == late
    if late:
        assert "'layers.0." in told[0]
        assert "get_peft_model" in told[0]
