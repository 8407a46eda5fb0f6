"""What autograd can be asked for: side losses, double backward, several losses, custom functions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import WIDTH, Block, Linear, stack
from twin import Run, case, compare


class Router(Block):
    """A block whose router weight enters the loss outside the path to the output."""

    def __init__(self):
        super().__init__()
        self.router = Linear(WIDTH, 4, matmul=True)
        self.aux = None

    def forward(self, x):
        gates = self.router(x).softmax(-1)
        self.aux = gates.mean(0).square().sum() + self.router.weight.square().mean()
        return super().forward(x) * gates[..., :1]


@case(stack(Router))
def test_router_side_loss(run: Run):
    for _ in range(3):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        run.step(loss + sum(layer.aux for layer in run.model.layers))


@case(stack(Router))
def test_only_the_side_loss(run: Run):
    """The output is not part of the loss: no gradient ever passes through most block outputs."""
    for _ in range(3):
        run.model(run.data(4, WIDTH))
        run.step(run.model.layers[3].aux + run.model.layers[0].aux)


@case(stack())
def test_weight_norm_in_loss(run: Run):
    for _ in range(3):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        run.step(loss + 0.01 * sum(p.norm() for p in run.model.parameters()))


@case(stack())
def test_weight_norm_before_forward(run: Run):
    for _ in range(3):
        penalty = sum(p.square().sum() for p in run.model.parameters())
        run.step(run.model(run.data(4, WIDTH)).square().mean() + 0.01 * penalty)


@case(stack())
def test_stack_of_weights_in_loss(run: Run):
    for _ in range(3):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        weights = torch.stack([layer.up.weight for layer in run.model.layers])
        run.step(loss + weights.var(0).mean() + torch.cat([w.flatten() for w in weights]).std())


@case(stack())
def test_loss_of_weights_alone(run: Run):
    for _ in range(3):
        run.step(sum((layer.up.weight @ layer.down.weight).square().mean() for layer in run.model.layers))


@case(stack())
def test_gradient_penalty(run: Run):
    """Double backward through every block, with respect to the input."""
    for _ in range(3):
        x = run.data(4, WIDTH).requires_grad_()
        out = run.model(x).square().mean()
        (g,) = torch.autograd.grad(out, x, create_graph=True)
        run.record("g", g)
        run.step(out + 0.1 * (g.norm() - 1).square())


@case(stack())
def test_double_backward_over_weights(run: Run):
    for _ in range(3):
        out = run.model(run.data(4, WIDTH)).square().mean()
        grads = torch.autograd.grad(out, list(run.model.parameters()), create_graph=True)
        run.step(out + 0.1 * sum(g.square().sum() for g in grads))


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_backward_create_graph(world):
    """``p.grad`` is part of a graph here, and is differentiated again."""

    def script(run: Run) -> None:
        for _ in range(2):
            run.model(run.data(4, WIDTH)).square().mean().backward(create_graph=True)
            penalty = sum(p.grad.square().sum() for p in run.model.parameters())
            run.record("penalty", penalty)
            penalty.backward()
            run.record_grads()
            run.opt.step()
            for p in run.model.parameters():
                p.grad = None

    compare(world, stack(), script)


@case(stack())
def test_hessian_vector_product(run: Run):
    params = list(run.model.parameters())
    loss = run.model(run.data(4, WIDTH)).square().mean()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    dot = sum((g * run.data(*g.shape)).sum() for g in grads)
    run.record("hvp", torch.autograd.grad(dot, params))


@case(stack())
def test_autograd_grad_leaves_grads_alone(run: Run):
    run.train(1)
    params = list(run.model.parameters())
    for _ in range(2):
        run.record("grads", torch.autograd.grad(run.model(run.data(4, WIDTH)).mean(), params))
        run.record_grads()
    run.train(1)


@case(stack())
def test_autograd_grad_of_some(run: Run):
    """Gradients of two blocks only; the others' are never computed."""
    chosen = [run.model.layers[1].up.weight, run.model.layers[3].down.weight]
    for _ in range(2):
        run.record("grads", torch.autograd.grad(run.model(run.data(4, WIDTH)).square().mean(), chosen))
    run.train(2)


@case(stack())
def test_backward_into_inputs(run: Run):
    """``backward(inputs=...)`` accumulates into the named parameters only."""
    run.model(run.data(4, WIDTH)).square().mean().backward(inputs=[run.model.layers[2].up.weight])
    run.record_grads()
    run.opt.step()
    run.opt.zero_grad()
    run.train(2)


@case(stack())
def test_retain_graph(run: Run):
    for _ in range(2):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        loss.backward(retain_graph=True)
        run.record_grads()
        loss.backward()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_two_losses_over_one_graph(run: Run):
    for _ in range(2):
        out = run.model(run.data(4, WIDTH))
        out.square().mean().backward(retain_graph=True)
        out.abs().mean().backward()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_backward_after_step_raises(run: Run):
    """Torch refuses: the weights that the graph saved have changed since."""
    loss = run.model(run.data(4, WIDTH)).square().mean()
    loss.backward(retain_graph=True)
    run.opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    run.opt.zero_grad()
    run.train(2)


@case(stack())
def test_graph_dropped_without_backward(run: Run):
    for _ in range(3):
        run.record("dropped", run.model(run.data(4, WIDTH)).mean())
        run.train(1)


@case(stack())
def test_graph_kept_over_a_step(run: Run):
    """A graph that is never run backward stays alive while training goes on."""
    kept = [run.model(run.data(4, WIDTH))]
    run.train(2)
    run.record("kept", kept[0])
    del kept[:]
    run.train(1)


@case(stack())
def test_loss_of_a_middle_activation(run: Run):
    for _ in range(2):
        seen = []
        handle = run.model.layers[2].register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        run.model(run.data(4, WIDTH))
        handle.remove()
        run.step(seen[0].square().mean())


@case(stack())
def test_detach_in_the_middle(run: Run):
    """Early blocks get no gradient; no node saves their weights."""
    for _ in range(2):
        x = run.model.inp(run.data(4, WIDTH))
        for i, layer in enumerate(run.model.layers):
            x = layer(x.detach() if i == 3 else x)
        run.step(run.model.out(x).square().mean())


class SavesWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class SavesView(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight.t())
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, transposed = ctx.saved_tensors
        return grad @ transposed.t(), grad.t() @ x


class StashesWeight(torch.autograd.Function):
    """Keeps the weight on ``ctx``, outside the reach of saved-tensor hooks."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.x, ctx.weight = x.detach(), weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight, grad.t() @ ctx.x


def with_function(function):
    class Custom(Block):
        def forward(self, x):
            return x + function.apply(torch.tanh(function.apply(x, self.up.weight)), self.down.weight)

    return stack(Custom)


@pytest.mark.parametrize("function", [SavesWeight, SavesView, StashesWeight], ids=lambda f: f.__name__)
def test_custom_function(function, world):
    """The stashed parameter itself is safe: it is the home outside its window."""
    compare(world, with_function(function), lambda run: run.train(3))


class Tree(nn.Module):
    """Blocks joined by additions and a branch that meets again."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        a, b = self.layers[0](x), self.layers[1](x)
        c = self.layers[2](a + b)
        return self.layers[5](self.layers[3](c) * torch.sigmoid(self.layers[4](a))) + c


@case(Tree)
def test_branches_that_meet(run: Run):
    run.train(3)


@case(stack())
def test_backward_of_a_block_alone(run: Run):
    for i in (3, 0, 2):
        run.step(run.model.layers[i](run.data(4, WIDTH)).square().mean())


@case(stack())
def test_gradient_of_the_input_only(run: Run):
    run.model.requires_grad_(False)
    x = run.data(4, WIDTH).requires_grad_()
    run.record("dx", torch.autograd.grad(run.model(x).square().mean(), x))
    run.model.requires_grad_(True)
    run.train(2)


@case(stack())
def test_anomaly_mode(run: Run):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        run.train(2)


@case(stack())
def test_embedding_like_use(run: Run):
    """Rows of a linear weight taken as an embedding."""
    for _ in range(2):
        rows = F.embedding(run.tokens(5), run.model.layers[2].up.weight)
        run.step(run.model(rows).square().mean())
