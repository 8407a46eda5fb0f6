"""Weights and modules used in more than one place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import WIDTH, Block, Decoder, Linear, Stack, stack
from twin import Run, case


def tied_blocks(ckpt: str = "none") -> Stack:
    """Blocks 0 and 4 share ``up.weight``, 1 and 5 share ``down.weight``; all are other units."""
    model = Stack(depth=6, call=calls(ckpt))
    model.layers[4].up.weight = model.layers[0].up.weight
    model.layers[5].down.weight = model.layers[1].down.weight
    return model


def calls(ckpt: str):
    if ckpt == "none":
        return lambda block, x: block(x)
    return lambda block, x: checkpoint(block, x, use_reentrant=ckpt == "reentrant")


def shared_block(ckpt: str = "none") -> Stack:
    """ALBERT: the same two blocks, three times over."""
    model = Stack(depth=4, call=calls(ckpt))
    first, second, third, _ = model.layers
    model.layers = nn.ModuleList([first, second, first, third, second, first])
    return model


@case(lambda: Decoder(tie=True))
def test_tied_head(run: Run):
    run.train(4)
    assert run.model.head.weight is run.model.embed.weight


@case(lambda: Decoder(matmul=True, tie=True))
def test_tied_head_matmul(run: Run):
    run.train(4)


@case(lambda: Decoder(matmul=True, ckpt="reentrant", tie=True))
def test_tied_head_reentrant(run: Run):
    run.train(3)


@case(tied_blocks)
def test_tied_across_units(run: Run):
    run.train(4)
    assert run.model.layers[4].up.weight is run.model.layers[0].up.weight


@case(lambda: tied_blocks("reentrant"))
def test_tied_across_units_reentrant(run: Run):
    run.train(3)


@case(lambda: tied_blocks("saved_tensors"))
def test_tied_across_units_checkpoint(run: Run):
    run.train(3)


@case(shared_block)
def test_block_called_three_times(run: Run):
    run.train(3)


@case(lambda: shared_block("reentrant"))
def test_block_called_three_times_reentrant(run: Run):
    run.train(3)


@case(lambda: shared_block("saved_tensors"))
def test_block_called_three_times_checkpoint(run: Run):
    run.train(3)


@case(stack())
def test_model_called_twice_before_backward(run: Run):
    for _ in range(3):
        a, b = run.model(run.data(4, WIDTH)), run.model(run.data(2, WIDTH))
        run.step(a.square().mean() + b.abs().mean())


@case(stack())
def test_two_forwards_two_backwards_in_order(run: Run):
    """The first graph's weights were paged out while the second forward ran."""
    for _ in range(3):
        losses = [run.model(run.data(4, WIDTH)).square().mean() for _ in range(3)]
        for loss in losses:
            loss.backward()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_two_forwards_two_backwards_reversed(run: Run):
    losses = [run.model(run.data(4, WIDTH)).square().mean() for _ in range(3)]
    for loss in reversed(losses):
        run.record("loss", loss)
        loss.backward()
    run.record_grads()
    run.opt.step()


class Recurrent(nn.Module):
    """A cell unrolled in time over stacked layers."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(Linear(WIDTH, WIDTH, True, bias=True) for _ in range(5))

    def forward(self, x):
        states = [torch.zeros_like(x) for _ in self.layers]
        for _ in range(3):
            h = x
            for i, cell in enumerate(self.layers):
                states[i] = h = torch.tanh(cell(h) + states[i])
        return h


@case(Recurrent)
def test_recurrent(run: Run):
    run.train(3)


class Borrower(Block):
    """Uses a weight of another unit directly, not through its module."""

    lender: "list[Block]" = []

    def forward(self, x):
        if self.lender:
            x = x + F.linear(x, self.lender[0].up.weight) * 0.1
            x = x + (x @ self.lender[0].down.weight.t()) * 0.1
        return super().forward(x)


def borrowing(ckpt: str = "none") -> Stack:
    model = Stack(Borrower, depth=6, call=calls(ckpt))
    model.layers[4].lender = [model.layers[0]]
    model.layers[1].lender = [model.layers[5]]
    return model


@case(borrowing)
def test_weight_of_another_unit_used_directly(run: Run):
    run.train(4)


@case(lambda: borrowing("reentrant"))
def test_weight_of_another_unit_reentrant(run: Run):
    run.train(3)


@case(lambda: borrowing("saved_tensors"))
def test_weight_of_another_unit_checkpoint(run: Run):
    run.train(3)


@case()
def test_buffer_shared_by_blocks(run: Run):
    """One mask registered in every block."""

    class Masked(Block):
        def forward(self, x):
            return super().forward(x) * self.mask

    model = Stack(Masked)
    mask = (torch.arange(WIDTH) % 3 > 0).float()
    for layer in model.layers:
        layer.register_buffer("mask", mask)
    run.model = run.wrap(model)
    run.opt = run.adamw()
    run.train(3)
    if run.offloaded:  # a plain model's own `to` makes one of each
        assert run.model.layers[0].mask is run.model.layers[1].mask


@case()
def test_two_models_in_one_process(run: Run):
    a, b = run.wrap(Stack()), run.wrap(Stack(depth=8))
    run.model, run.opt = nn.ModuleList([a, b]), None
    opts = [run.adamw(a.parameters()), run.adamw(b.parameters(), lr=3e-3)]
    for _ in range(3):
        x = run.data(4, WIDTH)
        loss = (a(x) - b(x)).square().mean()
        run.record("loss", loss)
        loss.backward()
        run.record_grads()
        for opt in opts:
            opt.step()
            opt.zero_grad()


@case()
def test_generator_and_discriminator(run: Run):
    """Two models, one frozen for half of each step."""
    g, d = run.wrap(Stack()), run.wrap(Stack())
    run.model = nn.ModuleList([g, d])
    og, od = run.adamw(g.parameters()), run.adamw(d.parameters())
    for _ in range(3):
        z = run.data(4, WIDTH)
        loss = d(g(z).detach()).mean() - d(run.data(4, WIDTH)).mean()
        od.zero_grad()
        loss.backward()
        od.step()
        d.requires_grad_(False)
        loss = -d(g(z)).mean()
        og.zero_grad()
        loss.backward()
        run.record("loss", loss)
        run.record_grads()
        og.step()
        d.requires_grad_(True)


@case()
def test_teacher_and_student(run: Run):
    student = run.wrap(Stack())
    teacher = run.wrap(copy.deepcopy(Stack()).requires_grad_(False).eval())
    run.model, run.opt = student, run.adamw(student.parameters())
    for _ in range(3):
        x = run.data(4, WIDTH)
        with torch.no_grad():
            target = teacher(x)
        run.step(F.mse_loss(student(x), target))


@pytest.mark.parametrize("tie", [True, False])
def test_identity_of_names(tie, host_world):
    """Names, identity and count of parameters are what they were."""
    run = Run(host_world, True)
    model = Decoder(tie=tie)
    before = {n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    keys, kind = list(model.state_dict()), type(model)
    run.wrap(model)
    after = {n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)}
    assert after == before
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
