"""Activation checkpointing of every kind, around and inside units."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

from funicular import testing
from models import WIDTH, Block, Decoder, Stack, stack
from twin import Run, World, case, compare

# Torch says so when an outer reentrant checkpoint runs an inner one without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")

REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved_tensors"])


class Inside(Block):
    """Calls checkpoint on a method of its own."""

    reentrant = False

    def mlp(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        return x + checkpoint(self.mlp, self.norm(x), use_reentrant=self.reentrant)


class InsideReentrant(Inside):
    reentrant = True


class RawInside(Block):
    """The checkpointed function uses the weights themselves: no module hook fires in the recomputation."""

    reentrant = False

    def raw(self, x):
        return torch.tanh(x @ self.up.weight.t()) @ self.down.weight.t()

    def forward(self, x):
        return x + checkpoint(self.raw, self.norm(x), use_reentrant=self.reentrant)


class RawInsideReentrant(RawInside):
    reentrant = True


@pytest.mark.covering(1)
@pytest.mark.parametrize("block", [Inside, InsideReentrant, RawInside, RawInsideReentrant], ids=lambda b: b.__name__)
def test_inside_a_unit(block, world):
    compare(world, stack(block), lambda run: run.train(3))


@pytest.mark.covering(2)
@pytest.mark.parametrize("block", [Inside, InsideReentrant, RawInside, RawInsideReentrant], ids=lambda b: b.__name__)
@REENTRANT
def test_nested(block, reentrant, world):
    """A checkpoint inside a checkpointed block."""
    compare(world, stack(block, call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant)), lambda run: run.train(3))


@REENTRANT
def test_forward_called_directly(reentrant, world):
    """As T5 of transformers 4.49 and others do: no hook of the block fires, and in the recomputation a window opens amid it."""
    call = lambda b, x: checkpoint(b.forward, x, use_reentrant=reentrant)
    compare(world, stack(lambda: Block(matmul=False), call=call), lambda run: run.train(3))
    compare(world, stack(RawInside if not reentrant else RawInsideReentrant, call=call), lambda run: run.train(3))


class Groups(Stack):
    """Checkpoints two blocks at a time, each of them checkpointed again."""

    reentrant = False

    def forward(self, x):
        x = self.inp(x)
        for i in range(0, len(self.layers), 2):
            x = checkpoint(self.pair, x, i, use_reentrant=self.reentrant)
        return self.out(x)

    def pair(self, x, i):
        for layer in self.layers[i : i + 2]:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


class GroupsReentrant(Groups):
    reentrant = True


@pytest.mark.parametrize("build", [Groups, GroupsReentrant], ids=lambda b: b.__name__)
def test_groups_of_blocks(build, world):
    compare(world, build, lambda run: run.train(3))


@pytest.mark.parametrize("build", [Groups, GroupsReentrant], ids=lambda b: b.__name__)
def test_groups_with_two_frames(build, world):
    compare(world, build, lambda run: run.train(2), frames=2)


@case(stack())
def test_whole_model_reentrant(run: Run):
    for _ in range(3):
        x = run.data(4, WIDTH).requires_grad_()
        run.step(checkpoint(run.model, x, use_reentrant=True).square().mean())


@case(stack())
def test_whole_model(run: Run):
    for _ in range(3):
        run.step(checkpoint(run.model, run.data(4, WIDTH), use_reentrant=False).square().mean())


@REENTRANT
def test_sequential(reentrant, world):
    def script(run: Run) -> None:
        for _ in range(3):
            x = run.model.inp(run.data(4, WIDTH))
            x = checkpoint_sequential(run.model.layers, 3, x, use_reentrant=reentrant)
            run.step(run.model.out(x).square().mean())

    compare(world, stack(), script)


def save_matmuls(ctx, op, *args, **kwargs):
    save = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return checkpoints.CheckpointPolicy.MUST_SAVE if save else checkpoints.CheckpointPolicy.PREFER_RECOMPUTE


@case(
    stack(
        call=lambda block, x: checkpoint(
            block,
            x,
            use_reentrant=False,
            context_fn=lambda: checkpoints.create_selective_checkpoint_contexts(save_matmuls),
        )
    )
)
def test_selective(run: Run):
    run.train(3)


@case(stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False)))
def test_without_early_stop(run: Run):
    with set_checkpoint_early_stop(False):
        run.train(3)


@case(lambda: Decoder(True, "saved_tensors"))
def test_mixed_with_none(run: Run):
    """Every other block checkpointed."""
    for step in range(3):
        for i, layer in enumerate(run.model.layers):
            layer.forward = functools.partial(through, type(layer).forward, layer, (i + step) % 2 == 0)
        run.train(1)
        for layer in run.model.layers:
            del layer.forward


def through(forward, layer, wrapped, x):
    return checkpoint(forward, layer, x, use_reentrant=False) if wrapped else forward(layer, x)


@REENTRANT
def test_accumulated(reentrant, world):
    """Reentrant checkpoints deliver gradients in parts; four passes add up."""

    def script(run: Run) -> None:
        for _ in range(2):
            for _ in range(4):
                run.model(run.data(4, WIDTH)).square().mean().backward()
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad()

    compare(world, stack(call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant)), script)


@REENTRANT
def test_only_some_weights_need_grad(reentrant, world):
    def build() -> Stack:
        model = Stack(call=lambda b, x: checkpoint(b, x, use_reentrant=reentrant))
        for layer in model.layers[::2]:
            layer.requires_grad_(False)
        return model

    compare(world, build, lambda run: run.train(3))


def test_checkpoint_still_recomputes(world):
    """Leases must not switch the checkpoint off: each block runs once more in backward."""
    counts = []

    class Counts(Block):
        def forward(self, x):
            counts.append(1)
            return super().forward(x)

    run = Run(world, True)
    run.model = run.wrap(Stack(Counts, call=lambda b, x: checkpoint(b, x, use_reentrant=False)))
    run.model(run.data(4, WIDTH)).square().mean().backward()
    assert len(counts) == 8


@case(stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False)))
def test_gradient_penalty_through_checkpoints(run: Run):
    for _ in range(2):
        x = run.data(4, WIDTH).requires_grad_()
        out = run.model(x).square().mean()
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        run.step(out + g.square().sum())


@case(stack(call=lambda block, x: checkpoint(block, x, use_reentrant=False)))
def test_save_on_cpu_around_checkpoints(run: Run):
    for _ in range(2):
        with torch.autograd.graph.save_on_cpu():
            loss = run.model(run.data(4, WIDTH)).square().mean()
        run.step(loss)


@pytest.mark.parametrize("how", ["plain", "saved_tensors", "reentrant"])
def test_backward_gives_up_what_it_has_passed(how: str, host_world: World):
    """A window ends where the next one begins: its frames are needed for what comes after that."""
    call = functools.partial(checkpoint, use_reentrant=how == "reentrant")
    run = Run(host_world, True)
    run.model = run.wrap(Stack(depth=10, call=lambda b, x: b(x) if how == "plain" else call(b, x)), frames=6)
    units = testing.inspect(run.model).units
    held: list[int] = []

    def count(grad: torch.Tensor) -> None:
        held.append(sum(unit.held for unit in units))

    def watch(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if out.requires_grad:  # not in the first run of a reentrant checkpoint
            out.register_hook(count)

    for layer in run.model.layers:
        layer.register_forward_hook(watch)
    for _ in range(2):
        run.model(run.data(4, run.model.width)).square().mean().backward()
    assert len(held) >= 20
    assert max(held) <= 2, held
