"""What cannot run in micro-batches is refused by name, and the model trains on afterwards."""

import re

import pytest
import torch
from torch import nn

import funicular
from models import WIDTH, Block, Stack, stack
from twin import Run


def refused(world, build, match, code="FN-E120", shape=(4, 3, WIDTH), rows=2):
    """Refused with the message; whole, the same model trains."""
    run = Run(world, True)
    run.model = run.wrap(build(), activations={"micro_batch": rows})
    with pytest.raises(funicular.UsageError) as error:
        run.model(run.data(*shape))
    assert error.value.code == code
    assert re.search(match, str(error.value)), str(error.value)
    assert re.search(r"'layers\.[05]'", str(error.value))
    assert 'activations.micro_batch = "off"' in str(error.value)
    funicular.unwrap(run.model)
    run.model = run.wrap(run.model)
    run.opt = run.adamw()
    run.step(run.model(run.data(*shape)).square().mean())


class Takes(Block):
    def forward(self, x, table=None, state=None):
        return super().forward(x)


def calls(*args, **kwargs):
    """A stack that gives its blocks more arguments."""
    return lambda: Stack(
        Takes, call=lambda block, x: block(x, *[a(x) for a in args], **{k: a(x) for k, a in kwargs.items()})
    )


def test_a_table_over_positions(host_world):
    build = calls(lambda x: torch.ones(3, WIDTH))
    refused(
        host_world, build, rf"argument 'table' has shape \(3, {WIDTH}\).*neither the batch, 4, nor 1.*unsqueeze\(0\)"
    )


def test_a_table_in_a_nest(host_world):
    build = calls(table=lambda x: {"a": [1, (torch.ones(7, 2),)]})
    refused(host_world, build, r"argument 'table'\['a'\]\[1\]\[0\] has shape \(7, 2\)")


def test_a_mask_over_heads_and_rows_flattened(host_world):
    refused(host_world, calls(lambda x: torch.ones(8, 1, 3)), r"argument 'table' has shape \(8, 1, 3\)")


def test_batch_as_long_as_the_sequence(host_world):
    """A mask over positions could be one over the batch."""
    build = calls(table=lambda x: torch.ones(4, 4))
    refused(host_world, build, r"batch and the sequence are both 4 long.*another batch size", shape=(4, 4, WIDTH))


def test_sparse_arguments(host_world):
    refused(host_world, calls(table=lambda x: torch.ones(4, 4).to_sparse()), "not a dense tensor")


class DynamicCache:
    pass


def test_a_cache(host_world):
    build = calls(state=lambda x: DynamicCache())
    refused(host_world, build, r"argument 'state' is a DynamicCache.*use_cache=False")


def test_objects(host_world):
    refused(host_world, calls(state=lambda x: nn.Linear(1, 1)), r"argument 'state' is a Linear.*plain data")


def test_generators(host_world):
    refused(host_world, calls(state=lambda x: torch.Generator()), r"argument 'state' is a Generator")


class Box:
    def __init__(self, x):
        self.x = x


def test_scalars_first(host_world):
    refused(
        host_world, lambda: Stack(Takes, call=lambda b, x: b(table=x.sum(), x=x)), "first tensor argument is a scalar"
    )


def test_no_tensor(host_world):
    class Reads(Block):
        def forward(self, flag):
            return super().forward(holder[-1])

    holder = []

    def call(block, x):
        holder.append(x)
        return block(True)

    refused(host_world, lambda: Stack(Reads, call=call), "it takes no tensor")


class Aux(Block):
    what = staticmethod(lambda x: x.square().mean())

    def forward(self, x):
        return super().forward(x), type(self).what(x)


def gives(what):
    kind = type("Gives", (Aux,), {"what": staticmethod(what)})
    return lambda: Stack(kind, call=lambda block, x: block(x)[0])


def test_scalar_outputs(host_world):
    refused(host_world, gives(lambda x: x.mean()), r"its output 1 has shape \(\) for a slice of 2 rows")


def test_flattened_outputs(host_world):
    refused(host_world, gives(lambda x: x.flatten(0, 1)), rf"its output 1 has shape \(6, {WIDTH}\)")


def test_an_output_of_one_element(host_world):
    """With slices of one row it looks like a row."""
    refused(host_world, gives(lambda x: x.mean().reshape(1)), r"its output 1 has shape \(1,\)", rows=1)


def test_objects_as_outputs(host_world):
    refused(host_world, gives(Box), "its output 1 is a Box")


def test_outputs_that_differ(host_world):
    refused(host_world, gives(lambda x: x.shape[0]), "its output 1 differs between slices", shape=(5, 3, WIDTH))
    refused(host_world, gives(lambda x: [x] * x.shape[0]), "another structure in each slice", shape=(5, 3, WIDTH))


class Keeps(Block):
    def forward(self, x):
        out = super().forward(x)
        self.aux = out.square().mean()
        return out


def test_side_losses(host_world):
    """A loss kept in an attribute would lose its gradient."""
    refused(
        host_world, lambda: Stack(Keeps), "a tensor that it made, with its graph, is kept by an attribute", "FN-E121"
    )


def test_hooks_inside_that_keep_tensors(host_world):
    kept = []

    def build():
        model = Stack()
        model.layers[0].norm.register_forward_hook(lambda m, a, o: kept.append(o))
        return model

    refused(host_world, build, "is kept by an attribute", "FN-E121")


def test_buffers_that_change(host_world):
    class Norm(Block):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

    refused(
        host_world,
        lambda: Stack(Norm),
        "changes its buffer 'norm.num_batches_tracked' in place",
        "FN-E121",
        shape=(4, WIDTH),
    )


def test_weights_that_change(host_world):
    class Clamps(Block):
        def forward(self, x):
            with torch.no_grad():
                self.up.weight.clamp_(-1, 1)
            return super().forward(x)

    refused(host_world, lambda: Stack(Clamps), "changes its parameter 'up.weight' in place", "FN-E121")


def test_arguments_that_change(host_world):
    class Adds(Takes):
        def forward(self, x, table=None):
            table += 1
            return super().forward(x) + table

    refused(host_world, lambda: Stack(Adds, call=lambda b, x: b(x, x.new_ones(4, 1, 1))), "changes its argument 1 in place", "FN-E121")  # fmt: skip


def test_another_shape_the_second_time(host_world):
    class Changes(Block):
        wide = True

        def forward(self, x):
            return super().forward(x) if self.wide else super().forward(x)[..., :8]

    run = Run(host_world, True)
    run.model = run.wrap(Stack(Changes), activations={"micro_batch": 2})
    loss = run.model(run.data(4, WIDTH)).square().mean()
    run.model.layers[3].wide = False
    with pytest.raises(
        funicular.UsageError, match=r"FN-E121 the block 'layers\.3'.*made other outputs when it was run again"
    ):
        loss.backward()
    run.model.layers[3].wide = True
    run.opt = run.adamw()
    run.opt.zero_grad()
    run.train(1)


def test_a_backward_in_forward(host_world):
    class Energy(Block):
        def forward(self, x):
            x = super().forward(x)
            (g,) = torch.autograd.grad(x.square().sum(), x, create_graph=False)
            return x - g

    refused(host_world, lambda: Stack(Energy), "its forward runs a backward of its own", "FN-E121")


def test_differentiated_twice(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(stack()(), activations={"micro_batch": 2})
    x = run.data(4, WIDTH).requires_grad_()
    with pytest.raises(funicular.UsageError, match=r"FN-E122 the block 'layers\.3'.*create_graph=True"):
        torch.autograd.grad(run.model(x).square().mean(), x, create_graph=True)
    run.model.zero_grad()
    run.model(x).sum().backward()
    assert x.grad.isfinite().all()
