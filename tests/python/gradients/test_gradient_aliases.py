"""Views and raw aliases of gradients that the user keeps: they stay what plain PyTorch would show."""

import numpy as np
import pytest
import torch
from torch import nn

from funicular import testing
from models import WIDTH, Stack, stack
from twin import Run, case, compare

pytestmark = pytest.mark.gradients


def backward(run: Run) -> None:
    loss = run.model(run.data(4, WIDTH)).square().mean()
    run.record("loss", loss)
    loss.backward()


def matrices(run: Run) -> list[nn.Parameter]:
    return [p for p in run.model.parameters() if p.dim() == 2]


KEEP = {
    "itself": lambda g: g,
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "view": lambda g: g.view(-1),
    "row": lambda g: g[1],
    "rows": lambda g: g[1:3],
    "t": lambda g: g.t(),
    "flatten": lambda g: g.flatten(),
    "chunk": lambda g: g.chunk(2)[1],
    "unbind": lambda g: list(g.unbind(0))[3],
    "view_of_view": lambda g: g.detach()[2:].view(-1)[::2],
    "data_of_view": lambda g: g[2:].data,
    "expand": lambda g: g[None].expand(3, *g.shape),
    "as_strided": lambda g: g.as_strided((2, 2), (1, 1)),
    "parameter": lambda g: nn.Parameter(g, requires_grad=False),
    "parameter_data": lambda g: nn.Parameter(g.data),
    "numpy": lambda g: g.numpy(),
    "detach_numpy": lambda g: g.detach().numpy(),
    "view_numpy": lambda g: g[1:].numpy(),
    "asarray": lambda g: np.asarray(g),
    "dlpack": lambda g: torch.from_dlpack(g),
    "np_dlpack": lambda g: np.from_dlpack(g.detach()),
    "storage": lambda g: torch.empty(0, device=g.device).set_(
        g.untyped_storage(), g.storage_offset(), g.size(), g.stride()
    ),
    "plain": lambda g: g.as_subclass(torch.Tensor),
    "list": lambda g: torch.functional.atleast_2d([g, g])[1],
    "real": lambda g: torch.real(g),
}


def shown(kept):
    return [
        torch.as_tensor(np.asarray(k.detach().cpu()) if isinstance(k, torch.Tensor) else np.asarray(k)).clone()
        for k in kept
    ]


@pytest.mark.covering(2)
@pytest.mark.parametrize("clear", ["none", "zero"])
@pytest.mark.parametrize("kind", KEEP)
def test_kept(kind, clear, two_worlds):
    """Over ``zero_grad`` and later backwards: with ``set_to_none`` the old values, without it the same memory as ever."""
    if two_worlds.device == "cuda" and any(part in kind for part in ("numpy", "np_", "asarray")):
        pytest.skip("numpy sees only the CPU")

    def script(run: Run) -> None:
        backward(run)
        kept = [KEEP[kind](p.grad) for p in matrices(run)]
        run.record("kept", shown(kept))
        run.opt.step()
        run.record("kept", shown(kept))
        run.opt.zero_grad(set_to_none=clear == "none")
        run.record("kept", shown(kept))
        for _ in range(2):
            backward(run)
            run.record("kept", shown(kept))
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad(set_to_none=clear == "none")
            run.record("kept", shown(kept))

    compare(two_worlds, stack(), script)


@pytest.mark.parametrize("kind", KEEP)
def test_kept_and_edited(kind, host_world):
    """An edit through the alias is an edit of the gradient, until the gradient is another one."""
    if host_world.device == "cuda" and any(part in kind for part in ("numpy", "np_", "asarray")):
        pytest.skip("numpy sees only the CPU")
    if kind == "expand":
        pytest.skip("torch refuses edits of it")

    def script(run: Run) -> None:
        kept = []
        for i in range(3):
            backward(run)
            kept.append([KEEP[kind](p.grad) for p in matrices(run)])
            for alias in kept[-1]:
                if isinstance(alias, torch.Tensor):
                    alias.data.mul_(0.5)
                else:
                    alias *= 0.5
            run.record_grads()
            if i == 1:
                backward(run)
                run.record_grads()
            run.record("kept", [shown(k) for k in kept])
            run.opt.step()
            run.opt.zero_grad()
            for alias in kept[0]:
                if isinstance(alias, torch.Tensor):
                    alias.data.mul_(0.5)
                else:
                    alias *= 0.5

    compare(host_world, stack(), script)


REPLACED = {
    "scaled": lambda p: p.grad * 0.5,
    "clone": lambda p: p.grad.clone(),
    "detached": lambda p: p.grad.detach(),
    "data": lambda p: p.grad.data,
    "view": lambda p: p.grad.view(-1).view_as(p),
    "rows": lambda p: p.grad.flip(0),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", REPLACED)
def test_replaced_while_the_old_one_is_kept(kind, world):
    """``g = p.grad; p.grad = f(g)``: both stay what they are, over step and backward."""

    def script(run: Run) -> None:
        for _ in range(3):
            backward(run)
            kept = [p.grad for p in run.model.parameters()]
            for p in run.model.parameters():
                p.grad = REPLACED[kind](p)
            run.record("kept", kept)
            run.record_grads()
            run.opt.step()
            run.record("kept", kept)
            run.record_grads()
            backward(run)
            run.record("kept", kept)
            run.record_grads()
            run.opt.step()
            run.record("kept", kept)
            run.opt.zero_grad()

    compare(world, stack(), script)


@case(stack())
def test_swapped_between_parameters(run: Run):
    for _ in range(2):
        backward(run)
        a, b = run.model.layers[0].up.weight, run.model.layers[3].up.weight
        a.grad, b.grad = b.grad, a.grad
        run.record_grads()
        run.opt.step()
        run.record_grads()
        backward(run)
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_one_gradient_for_two(run: Run):
    for _ in range(2):
        backward(run)
        a, b = run.model.layers[0].up.weight, run.model.layers[3].up.weight
        a.grad = b.grad
        run.opt.step()
        run.record_grads()
        b.grad.mul_(2)
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_in_a_graph(run: Run):
    """A gradient is a constant of another loss, whose backward comes after the next gradients."""
    q = run.data(WIDTH, WIDTH).requires_grad_()
    losses = []
    for _ in range(3):
        backward(run)
        losses.append((run.model.layers[2].up.weight.grad * q).sum())
        losses.append((run.model.layers[3].up.weight.grad.detach() @ q).square().sum())
        run.opt.step()
        run.opt.zero_grad()
    for loss in losses:
        run.record("loss", loss)
        loss.backward()
        run.record("q", q.grad)


@case(stack())
def test_kept_by_a_hook(run: Run):
    """What a post-accumulate hook stores is what it saw."""
    kept = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: kept.append((p.grad.detach(), p.grad.clone())))
        for p in run.model.parameters()
    ]
    for _ in range(3):
        backward(run)
        run.opt.step()
        run.opt.zero_grad()
    for handle in handles:
        handle.remove()
    run.record("kept", kept)


@case(stack())
def test_kept_by_a_tensor_hook(run: Run):
    kept = []
    handles = [p.register_hook(lambda g: kept.append(g)) for p in run.model.parameters()]
    for _ in range(2):
        backward(run)
        backward(run)
        run.record("kept", kept)
        run.opt.step()
        run.opt.zero_grad()
    for handle in handles:
        handle.remove()
    run.record("kept", kept)


@case(stack())
def test_previous_gradients(run: Run):
    """Momentum of one's own: the difference of two steps' gradients."""
    old = None
    for _ in range(4):
        backward(run)
        new = [p.grad.data for p in run.model.parameters()]
        if old is not None:
            run.record("difference", [a - b for a, b in zip(new, old)])
        old = new
        run.opt.step()
        run.model.zero_grad(set_to_none=True)


@case(stack())
def test_accumulated_by_hand(run: Run):
    total = None
    for _ in range(3):
        backward(run)
        grads = [p.grad for p in run.model.parameters()]
        run.model.zero_grad(set_to_none=True)
        total = grads if total is None else [a + b for a, b in zip(total, grads)]
    for p, g in zip(run.model.parameters(), total):
        p.grad = g
    run.opt.step()
    run.record_grads()


@case(stack())
def test_fused_optimizer_after_views(run: Run):
    opt = torch.optim.AdamW(run.model.parameters(), lr=1e-2, fused=True)
    kept = []
    for _ in range(3):
        backward(run)
        kept += [p.grad[:1] for p in matrices(run)]
        opt.step()
        run.record_grads()
        opt.zero_grad()
    run.record("kept", kept)


def test_views_that_are_gone_cost_nothing(host_world):
    """Gradients that are only looked at stay in their segments."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    first = None
    for _ in range(3):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        for p in run.model.parameters():
            p.grad.detach().norm()
            p.grad.data.mul_(0.5)
            p.grad.view(-1)[0].item()
        where = [testing.inspect_parameter(p.grad).gradient is p.grad for p in run.model.parameters()]
        assert all(where)
        first = first or where
        run.opt.step()
        run.opt.zero_grad()
