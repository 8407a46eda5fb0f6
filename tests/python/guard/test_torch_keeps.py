"""What plain torch keeps alive for ever, without funicular: why two patterns in the other tests are as they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import facts
from models import WIDTH, Stack


def is_kept(use: Callable[[nn.Module], None]) -> bool:
    """Whether a model outlives its last user and the collector."""
    model = Stack()
    use(model)
    alive = weakref.ref(model)
    del model
    for _ in range(5):
        gc.collect()
    return alive() is not None


def backward(model: nn.Module) -> None:
    model(torch.ones(4, WIDTH)).square().mean().backward()
    model.zero_grad()


def test_nothing_is_kept():
    """The other tests can fail."""
    assert not is_kept(backward)


@pytest.mark.parametrize("closes_over", ["the model", "nothing"])
def test_hooks_on_parameters(closes_over: str):
    """The collector does not look behind a parameter: what its post-accumulate hook closes over is kept with it."""

    def use(model: nn.Module) -> None:
        kept = model if closes_over == "the model" else None
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p, kept=kept: None)
        backward(model)

    assert is_kept(use) == (closes_over == "the model")


class Trap(torch.autograd.Function):
    """Raises the exception that hangs on its context, or one like it."""

    @staticmethod
    def forward(ctx, x, error, new):
        ctx.error, ctx.new = error, new
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise type(ctx.error)() if ctx.new else ctx.error


@pytest.mark.parametrize("new", [False, True])
def test_exceptions_on_a_context(new: bool):
    """A context keeps its exception, whose traceback keeps the context and all that the failed step used."""

    def use(model: nn.Module) -> None:
        with pytest.raises(ValueError):
            Trap.apply(model(torch.ones(4, WIDTH)), ValueError(), new).sum().backward()

    assert is_kept(use) != new


def test_backwards_that_ended_in_an_exception():
    """What was still queued keeps its graph, with all saved tensors, until the thread's next backward."""

    def fails(p: torch.Tensor) -> None:
        raise ValueError

    def use(model: nn.Module) -> None:
        loss = model(torch.ones(4, WIDTH)).square().mean()
        model.out.bias.register_post_accumulate_grad_hook(fails)
        with pytest.raises(ValueError):
            loss.backward()

    model = Stack()
    use(model)
    alive = weakref.ref(model.layers[0])
    kept = weakref.ref(model.inp.weight)
    del model
    gc.collect()
    assert alive() is None
    assert kept() is not None
    facts.forget_backwards()
    gc.collect()
    assert kept() is None
