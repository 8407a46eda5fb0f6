"""What blocks take and return: inputs passed through, views of weights, every kind of container."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from models import WIDTH, Block, Linear, Stack, stack
from twin import Run, case, compare


class PassesThrough(Block):
    """T5: the position bias of the first block goes through all others, unchanged, and back out."""

    def forward(self, pair):
        x, bias = pair
        if bias is None:
            bias = self.up.bias.abs() + self.up.weight.mean(0)
        return super().forward(x + bias), bias


class PairStack(Stack):
    def forward(self, x):
        pair = (self.inp(x), None)
        for layer in self.layers:
            pair = layer(pair)
        return self.out(pair[0]) + pair[1].sum()


@case(lambda: PairStack(PassesThrough))
def test_position_bias_through_all_blocks(run: Run):
    run.train(3)


class ReturnsItsInput(Block):
    def forward(self, x):
        return (x, super().forward(x)) if isinstance(x, torch.Tensor) else (x[0], super().forward(x[1]))


@case(lambda: Stack(ReturnsItsInput, call=lambda block, x: block(x)[1]))
def test_output_contains_the_input(run: Run):
    run.train(3)


class InputStack(Stack):
    def forward(self, x):
        pair = self.inp(x)
        for layer in self.layers:
            pair = layer(pair)
        return pair[0] * 0.5 + self.out(pair[1])


@case(lambda: InputStack(ReturnsItsInput))
def test_input_survives_all_blocks(run: Run):
    """The first block's input is used after the last: its gradient arrives in two parts."""
    run.train(3)


@case(stack())
def test_leaf_input_that_needs_grad(run: Run):
    x = nn.Parameter(run.data(4, WIDTH))
    for _ in range(2):
        run.step(run.model(x).square().mean())
    run.record("dx", x.grad)


Point = namedtuple("Point", "x extra")


@dataclass
class Plain:
    x: torch.Tensor
    extra: object = None


@dataclass
class Output(ModelOutput):
    x: torch.Tensor = None
    extra: object = None


class Custom:
    """A container that no tree utility knows."""

    def __init__(self, x, extra):
        self.x, self.extra = x, extra


CONTAINERS = {
    "dict": lambda x: {"x": x, "extra": None},
    "ordered": lambda x: OrderedDict(x=x, n=3),
    "nested": lambda x: {"x": x, "extra": [(x.detach(), None), {"k": "text"}]},
    "namedtuple": lambda x: Point(x, 7),
    "dataclass": lambda x: Plain(x, x.mean()),
    "model_output": lambda x: Output(x=x, extra=(x, x)),
    "custom": lambda x: Custom(x, x * 2),
    "tuple_with_none": lambda x: (None, "s", x, 1.5),
    "view": lambda x: {"x": x.view(-1).view_as(x)},
    "generator": lambda x: iter([x]),
}


def unpack(out):
    if isinstance(out, dict):
        return out["x"]
    if isinstance(out, tuple) and not hasattr(out, "x"):
        return out[2]
    return out.x if hasattr(out, "x") else next(out)


@pytest.mark.covering(1)
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container, world):
    class Contains(Block):
        def forward(self, x):
            return CONTAINERS[container](super().forward(x))

    compare(world, stack(Contains, call=lambda block, x: unpack(block(x))), lambda run: run.train(3))


class ReturnsNothing(Block):
    """Writes its result into a list it was given."""

    def forward(self, box):
        box.append(super().forward(box.pop()))


class BoxStack(Stack):
    def forward(self, x):
        box = [self.inp(x)]
        for layer in self.layers:
            assert layer(box) is None
        return self.out(box[0])


@case(lambda: BoxStack(ReturnsNothing))
def test_result_in_a_mutable_argument(run: Run):
    run.train(3)


class KeywordOnly(Block):
    def forward(self, *, hidden, scale=None):
        return super().forward(hidden) if scale is None else super().forward(hidden) * scale


@case(stack(KeywordOnly, call=lambda block, x: block(hidden=x, scale=0.9)))
def test_keyword_arguments(run: Run):
    run.train(3)


class WithoutTensors(Block):
    """Makes its own input, so no argument carries a gradient."""

    def forward(self, seed):
        x = torch.linspace(-1, 1, WIDTH, device=self.up.weight.device).expand(3, WIDTH) * seed
        return super().forward(x)


class Sources(Stack):
    def forward(self, x):
        return self.out(self.inp(x)).mean() + sum(layer(i + 1).square().mean() for i, layer in enumerate(self.layers))


@case(lambda: Sources(WithoutTensors))
def test_no_tensor_arguments(run: Run):
    run.train(3)


class InPlace(Block):
    def forward(self, x):
        y = super().forward(x)
        y.mul_(0.5).add_(1)
        return y


@case(stack(InPlace))
def test_in_place_on_the_activation(run: Run):
    run.train(3)


def inplace_call(block, x):
    y = block(x)
    return y.add_(0.25)


@case(stack(call=inplace_call))
def test_in_place_on_a_block_output(run: Run):
    run.train(3)


class GivesWeight(Block):
    """Returns its parameter itself; the caller uses it after the window."""

    def forward(self, x):
        return super().forward(x), self.up.weight


class GivesView(Block):
    """Returns views of its parameters."""

    def forward(self, x):
        return super().forward(x), self.up.weight.t()[1:], self.norm.weight.view(1, -1)


class GivesDetached(Block):
    def forward(self, x):
        return super().forward(x), self.up.weight.detach(), self.down.weight.data


class UsesExtras(Stack):
    """Keeps what blocks return beside the activation until all have run."""

    def forward(self, x):
        x, kept = self.inp(x), []
        for layer in self.layers:
            x, *extras = layer(x)
            kept += extras
        return self.out(x), sum((k * (i + 1)).square().mean() for i, k in enumerate(kept))


@case(lambda: UsesExtras(GivesWeight))
def test_weight_as_output(run: Run):
    run.train(3)


@case(lambda: UsesExtras(GivesView))
def test_view_of_a_weight_as_output(run: Run):
    run.train(3)


@case(lambda: UsesExtras(GivesDetached))
def test_detached_weight_as_output(run: Run):
    run.train(3)


class TiedOutput(Block):
    """A weight handed to the next block as an argument (hyper-network like)."""

    def forward(self, pair):
        x, weight = pair
        if weight is not None:
            x = x + torch.tanh(x @ weight.t())
        return super().forward(x), self.down.weight


class HandsOn(Stack):
    def forward(self, x):
        pair = (self.inp(x), None)
        for layer in self.layers:
            pair = layer(pair)
        return self.out(pair[0])


@case(lambda: HandsOn(TiedOutput))
def test_weight_as_argument_of_the_next(run: Run):
    run.train(3)


class OnlyView(nn.Module):
    """A learned table: its output is nothing but a view of its parameter."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, n):
        return self.table[:n]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(OnlyView() for _ in range(6))

    def forward(self, x):
        return sum(torch.sin(x @ layer(8).t()) for layer in self.layers)


@case(Positions)
def test_block_that_is_a_table(run: Run):
    run.train(3)


class SplitsWeights(Block):
    """Saves chunks, permutations and expansions of its weights for backward."""

    def forward(self, x):
        a, b = self.up.weight.chunk(2, 0)
        y = torch.cat([x @ a.t(), F.linear(x, b)], -1)
        z = torch.einsum("bi,oi->bo", y, self.down.weight.permute(1, 0))
        return x + torch.tanh(z + self.up.bias.expand_as(z)) * self.norm.weight.unsqueeze(0)


@case(stack(SplitsWeights))
def test_chunks_and_permutations(run: Run):
    run.train(3)


class Composite(Block):
    """Effective weights that are functions of the stored ones."""

    def forward(self, x):
        weight = self.up.weight * torch.sigmoid(self.down.weight) + self.up.weight.t()
        return x + torch.tanh(x @ weight.t()) / weight.norm()


@case(stack(Composite))
def test_computed_weights(run: Run):
    run.train(3)


class Shrinks(nn.Module):
    """An embedding whose output has no input that needs grad, and whose weight is padded."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.embed = nn.Embedding(31, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(Linear(WIDTH, WIDTH, True) for _ in range(5))

    def example(self, run):
        return run.tokens(3, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = F.relu(layer(x)) + x
        return x


@case(Shrinks)
def test_embedding_with_padding(run: Run):
    run.train(3)
