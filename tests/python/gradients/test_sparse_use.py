"""Parameters that get no gradient: frozen, skipped, unrouted, unused; and parameters of odd kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models import WIDTH, Block, Decoder, Linear, Stack, stack
from twin import Run, case, compare


class Lora(nn.Module):
    """A frozen base with a trained low-rank addition."""

    def __init__(self, base: Linear, rank: int = 3):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, WIDTH) / 8)
        self.b = nn.Parameter(torch.zeros(WIDTH, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


def lora(ckpt: str = "none", bias: bool = False) -> Stack:
    call = (lambda b, x: b(x)) if ckpt == "none" else (lambda b, x: checkpoint(b, x, use_reentrant=ckpt == "reentrant"))
    model = Stack(call=call)
    model.requires_grad_(False)
    for layer in model.layers:
        layer.up, layer.down = Lora(layer.up), Lora(layer.down)
    if ckpt == "reentrant":  # needs an input that needs grad
        model.inp.requires_grad_(True)
    return model


@case(lora)
def test_lora(run: Run):
    run.train(4)


@case(lambda: lora("reentrant"))
def test_lora_reentrant(run: Run):
    run.train(3)


@case(lambda: lora("saved_tensors"))
def test_lora_checkpoint(run: Run):
    run.train(3)


@case()
def test_optimizer_over_trainable_only(run: Run):
    run.model = run.wrap(lora())
    run.opt = run.adamw([p for p in run.model.parameters() if p.requires_grad])
    run.train(3)


def frozen(*names: str):
    def build() -> Stack:
        model = Stack()
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in names))
        return model

    return build


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "names", [("weight",), ("bias",), ("layers.0", "layers.1"), ("layers",), ("inp", "out"), ("up",)], ids=str
)
def test_frozen(names, world):
    compare(world, frozen(*names), lambda run: run.train(3))


@case(lambda: Stack().requires_grad_(False))
def test_all_frozen(run: Run):
    x = run.data(4, WIDTH).requires_grad_()
    for _ in range(3):
        run.model(x).square().mean().backward()
    run.record("dx", x.grad)


@case(stack())
def test_freeze_mid_run(run: Run):
    """Blocks frozen and thawed between steps keep their moments."""
    for step in range(6):
        for i, layer in enumerate(run.model.layers):
            layer.requires_grad_(step not in (2, 3) or i % 2 == 0)
        run.train(1)


@case(frozen("layers.2", "layers.3"))
def test_unfreeze_what_was_frozen_at_wrap(run: Run):
    run.train(2)
    run.model.requires_grad_(True)
    run.train(3)


@case(stack())
def test_freeze_between_forward_and_backward(run: Run):
    for i in range(3):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        run.model.layers[i].requires_grad_(False)
        run.step(loss)
        run.model.layers[i].requires_grad_(True)


class LayerDrop(Stack):
    """Skips blocks by a script, differently every step."""

    pattern = ["111111", "101010", "000000", "011110", "100001", "111111", "000001"]
    step = -1

    def forward(self, x):
        self.step += 1
        x = self.inp(x)
        for layer, keep in zip(self.layers, self.pattern[self.step % len(self.pattern)]):
            if keep == "1":
                x = layer(x)
        return self.out(x)


@case(lambda: LayerDrop(depth=6))
def test_skipped_blocks(run: Run):
    run.train(9)


class Branches(Stack):
    """Chooses its path by the data, and sometimes runs the blocks in another order."""

    def forward(self, x):
        x = self.inp(x)
        order = range(6) if x.mean() > 0 else (5, 1, 3, 1)
        for i in order:
            x = self.layers[i](x)
        return self.out(x)


@case(lambda: Branches(depth=6))
def test_data_dependent_branches(run: Run):
    run.train(8)


@case(stack(depth=6))
def test_shuffled_order(run: Run):
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 0], [3, 5, 1, 0, 4, 2], [0, 1, 2, 3, 4, 5]):
        x = run.model.inp(run.data(4, WIDTH))
        for i in order:
            x = run.model.layers[i](x)
        run.step(run.model.out(x).square().mean())


class Moe(nn.Module):
    """Top-1 routing over experts; most get no token in a step."""

    def __init__(self, experts: int = 8):
        super().__init__()
        self.width = WIDTH
        self.router = Linear(WIDTH, experts)
        self.experts = nn.ModuleList(Block() for _ in range(experts))

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        weight, chosen = gates.max(-1)
        out = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            rows = (chosen == i).nonzero().squeeze(-1)
            out = out + torch.zeros_like(x).index_put((rows,), self.experts[i](x[rows]) * weight[rows, None])
        return out


@case(Moe)
def test_unrouted_experts(run: Run):
    for _ in range(6):
        run.step(run.model(run.data(3, WIDTH)).square().mean())


@case(Moe)
def test_unrouted_experts_accumulated(run: Run):
    """An expert routed in one micro-batch only."""
    for _ in range(3):
        for _ in range(3):
            run.model(run.data(2, WIDTH)).square().mean().backward()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


class MoeInBlocks(nn.Module):
    """Experts inside every block of the largest list: a unit of which a part is used."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(Moe(3) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@case(MoeInBlocks)
def test_unrouted_experts_inside_a_unit(run: Run):
    run.train(4)


class HasUnused(Block):
    def __init__(self):
        super().__init__()
        self.unused = Linear(WIDTH, WIDTH)
        self.lonely = nn.Parameter(torch.randn(5))


@case(stack(HasUnused))
def test_unused_parameters(run: Run):
    """Gradient None: neither updated nor decayed."""
    run.train(3)
    assert run.model.layers[0].unused.weight.grad is None


@case()
def test_unit_never_called(run: Run):
    model = Stack()
    model.spare = Block()
    model.layers.append(Block())
    model.forward = lambda x: model.out(sequence(model.layers[:6], model.inp(x)))
    run.model = run.wrap(model)
    run.opt = run.adamw()
    run.train(3)
    del model.forward


def sequence(layers, x):
    for layer in layers:
        x = layer(x)
    return x


class Odd(nn.Module):
    """Sizes that align with nothing: 0-dim, zero elements, one element, primes, many dimensions, non-contiguous."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 7))
        self.one = nn.Parameter(torch.randn(1))
        self.prime = nn.Parameter(torch.randn(127))
        self.cube = nn.Parameter(torch.randn(3, 5, 7, 1))
        self.turned = nn.Parameter(torch.randn(WIDTH, 13).t())
        self.channels = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, x):
        y = torch.tanh(x @ self.weight.t()) * self.scale + self.one + self.none.sum()
        z = (x @ self.turned.t()).mean() + self.prime.square().mean()
        return x + y * z + self.cube.mean() + self.channels.square().mean()


@case(stack(Odd))
def test_odd_shapes(run: Run):
    strides = {n: p.stride() for n, p in run.model.named_parameters()}
    run.train(3)
    assert {n: p.stride() for n, p in run.model.named_parameters()} == strides


class Mixed(Block):
    """bf16 matrices, fp32 norms, an fp16 gate."""

    def __init__(self):
        super().__init__()
        self.up.bfloat16()
        self.down.bfloat16()
        self.gate = nn.Parameter(torch.ones(WIDTH, dtype=torch.float16))

    def forward(self, x):
        h = self.norm(x).bfloat16()
        return x + self.down(F.gelu(self.up(h))).float() * self.gate.float()


@case(stack(Mixed))
def test_mixed_types(run: Run):
    run.train(4)


class Stateful(nn.Module):
    """BatchNorm and a non-persistent buffer edited in forward."""

    def __init__(self):
        super().__init__()
        self.linear = Linear(WIDTH, WIDTH, True)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        return x + F.relu(self.norm(self.linear(x))) - self.mean


@case(stack(Stateful))
def test_buffers(run: Run):
    run.train(3)
    run.model.eval()
    with torch.no_grad():
        run.record("eval", run.model(run.data(4, WIDTH)))
    run.model.train()
    run.train(1)
    assert not any("calls" in key for key in run.model.state_dict())


@case(stack(Stateful))
def test_buffers_cumulative(run: Run):
    for _ in range(2):
        for _ in range(2):
            run.model(run.data(4, WIDTH)).square().mean().backward()
        run.opt.step()
        run.opt.zero_grad()


class Listed(nn.Module):
    """ParameterList and ParameterDict."""

    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 8 for _ in range(2))
        self.dict = nn.ParameterDict({"scale": torch.ones(WIDTH), "shift": torch.zeros(WIDTH)})

    def forward(self, x):
        for weight in self.list:
            x = x + torch.tanh(x @ weight.t())
        return x * self.dict["scale"] + self.dict["shift"]


@case(stack(Listed))
def test_parameter_list_and_dict(run: Run):
    run.train(3)


class Attribute(Block):
    """Blocks of equal shape that differ in plain attributes."""

    def forward(self, x):
        return super().forward(x) * (1 + self.index)


@case()
def test_equal_shapes_other_attributes(run: Run):
    model = Stack(Attribute)
    for i, layer in enumerate(model.layers):
        layer.index = i / 8
    run.model = run.wrap(model)
    run.opt = run.adamw()
    run.train(3)


@case(lambda: Decoder(True, dropout=0.3))
def test_dropout_uses_the_same_random_numbers(run: Run):
    run.train(3)


@case(stack(), units={"match": ["layers.*", "inp", "out"]})
def test_units_by_policy(run: Run):
    run.train(3)


@case(stack(), units={"match": ["layers.*.up", "layers.*.down"]})
def test_units_smaller_than_blocks(run: Run):
    run.train(3)
