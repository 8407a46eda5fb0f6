"""Ways to call a model that are not ``model(x)``: functional_call, transforms, methods, autocast, compile."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrizations, parametrize

import facts
import funicular
from models import WIDTH, Block, Decoder, Linear, Stack, stack
from twin import Run, case, compare

# Torch's own forward-mode rules use torch.jit at their first call.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@case(stack())
def test_functional_call_with_other_weights(run: Run):
    """The model's own weights are not touched, those given get the gradient."""
    run.train(1)
    other = {n: (p.detach() * 0.5).requires_grad_() for n, p in run.model.named_parameters()}
    for _ in range(2):
        out = functional_call(run.model, other, (run.data(4, WIDTH),))
        run.record("grads", torch.autograd.grad(out.square().mean(), list(other.values())))
    run.train(2)


@case(stack())
def test_functional_call_with_own_weights(run: Run):
    for _ in range(3):
        run.step(functional_call(run.model, dict(run.model.named_parameters()), (run.data(4, WIDTH),)).square().mean())


@case(stack())
def test_functional_call_with_some(run: Run):
    for _ in range(2):
        other = {"layers.2.up.weight": run.data(WIDTH, WIDTH) / 8}
        run.step(functional_call(run.model, other, (run.data(4, WIDTH),)).square().mean())


@case(stack())
def test_functional_call_with_scaled_weights(run: Run):
    """MAML's shape: new weights are functions of the stored ones."""
    for _ in range(2):
        x = run.data(4, WIDTH)
        params = dict(run.model.named_parameters())
        inner = torch.autograd.grad(run.model(x).square().mean(), list(params.values()), create_graph=True)
        fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), inner)}
        run.step(functional_call(run.model, fast, (x,)).square().mean())


def second_order(ahead: str) -> list[Tensor]:
    """Gradients through a gradient that another thread computed, as those of a GPU are; ``ahead``: whose nodes have higher numbers."""
    found: list[Tensor] = []

    def first(loss: Tensor, params: list[Tensor]) -> None:
        if ahead == "the other":
            facts.get_ahead(1000)
        found.extend(torch.autograd.grad(loss, params, create_graph=True))

    def second() -> None:
        if ahead == "this":
            facts.get_ahead(1000)
        torch.manual_seed(0)
        model = Stack(width=32, block=lambda: Block(32))
        x = torch.randn(4, 32)
        params = dict(model.named_parameters())
        other = threading.Thread(target=first, args=(model(x).square().mean(), list(params.values())))
        other.start()
        other.join()
        fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), found)}
        functional_call(model, fast, (x,)).square().mean().backward()
        found[:] = [p.grad for p in params.values()]

    this = threading.Thread(target=second)  # a new one: its nodes are numbered from 0
    this.start()
    this.join()
    return found


def test_second_order_depends_on_what_ran_before():
    """In plain torch, by the last bit, unless one thread's nodes come first: the tests of a GPU see to that."""
    equal = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert equal(second_order("this"), second_order("this"))
    assert not equal(second_order("this"), second_order("the other"))
    assert not equal(second_order("this"), second_order("neither"))


def loss_of(model):
    return lambda params, x: functional_call(model, params, (x,)).square().mean()


@case(stack())
def test_func_grad(run: Run):
    for _ in range(2):
        params = {n: p.detach() for n, p in run.model.named_parameters()}
        run.record("grad", grad(loss_of(run.model))(params, run.data(4, WIDTH)))
        run.train(1)


@case(stack())
def test_vmap_of_grad(run: Run):
    """Gradients per sample."""
    for _ in range(2):
        params = {n: p.detach() for n, p in run.model.named_parameters()}
        run.record("grads", vmap(grad(loss_of(run.model)), (None, 0))(params, run.data(5, 1, WIDTH)))
        run.train(1)


@case(stack())
def test_vmap_of_the_model(run: Run):
    for _ in range(2):
        run.step(vmap(run.model)(run.data(5, 2, WIDTH)).square().mean())


@case(stack())
def test_vjp(run: Run):
    out, pull = vjp(lambda x: run.model(x), run.data(4, WIDTH))
    run.record("out", out)
    run.record("vjp", pull(torch.ones_like(out)))
    run.train(1)


@case(stack())
def test_jvp(run: Run):
    x, t = run.data(4, WIDTH), run.data(4, WIDTH)
    run.record("jvp", jvp(lambda x: run.model(x), (x,), (t,)))
    run.train(1)


@case(stack())
def test_jvp_of_weights(run: Run):
    params = {n: p.detach() for n, p in run.model.named_parameters()}
    tangents = {n: run.data(*p.shape) for n, p in params.items()}
    x = run.data(4, WIDTH)
    run.record("jvp", jvp(lambda p: functional_call(run.model, p, (x,)), (params,), (tangents,)))
    run.train(1)


@case(stack(depth=5))
def test_jacobian(run: Run):
    run.record("jacobian", jacrev(lambda x: run.model(x))(run.data(WIDTH)[:WIDTH]))
    run.train(1)


@case(stack())
def test_forward_mode(run: Run):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(run.data(4, WIDTH), run.data(4, WIDTH))
        run.record("tangent", torch.autograd.forward_ad.unpack_dual(run.model(dual)).tangent)
    run.train(1)


@case(stack())
def test_stack_module_state(run: Run):
    """An ensemble made of the blocks."""
    run.train(1, look=False)
    params, buffers = stack_module_state(list(run.model.layers))
    block = Block().to(run.device)
    x = run.data(3, WIDTH)
    run.record("ensemble", vmap(lambda p, b: functional_call(block, (p, b), (x,)))(params, buffers))
    run.train(1)


@case(stack(call=lambda block, x: block.forward(x)))
def test_forward_called_directly(run: Run):
    """No hook of a block fires."""
    run.train(3)


@case(stack(call=lambda block, x: x + block.down(F.gelu(block.up(block.norm(x))))))
def test_submodules_called_directly(run: Run):
    """The block is never called, its parts are."""
    run.train(3)


@case(stack(call=lambda block, x: x + torch.tanh(x @ block.up.weight.t()) @ block.down.weight.t()))
def test_weights_used_directly(run: Run):
    """No module is called at all; the weights are used from their homes."""
    run.train(3)


@case(stack(call=lambda block, x: x + torch.tanh(F.linear(x, block.up.weight, block.up.bias))))
def test_bare_linear(run: Run):
    run.train(3)


class Methods(Stack):
    """Used through methods that are not forward."""

    def encode(self, x):
        x = self.inp(x)
        for layer in self.layers[:3]:
            x = layer(x)
        return x

    def decode(self, x):
        for layer in self.layers[3:]:
            x = layer(x)
        return self.out(x)


@case(Methods)
def test_methods(run: Run):
    for _ in range(3):
        run.step(run.model.decode(run.model.encode(run.data(4, WIDTH))).square().mean())


@case(stack())
def test_named_accessors(run: Run):
    run.train(1, look=False)
    run.record("weight", run.model.get_parameter("layers.3.up.weight"))
    run.record("shape", tuple(run.model.get_submodule("layers.1").up.weight.shape))
    run.train(1)


@pytest.mark.parametrize("enter", ["whole", "per_block"])
def test_autocast(enter, world):
    def script(run: Run) -> None:
        for _ in range(3):
            x = run.data(4, WIDTH)
            if enter == "whole":
                with torch.autocast(run.device.type, torch.bfloat16):
                    loss = run.model(x).float().square().mean()
            else:
                loss = run.model(x).float().square().mean()
            run.step(loss)

    def call(block, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return block(x).float()

    compare(world, stack(call=call) if enter == "per_block" else stack(), script)


@case(stack())
def test_autocast_weight_used_twice(run: Run):
    """One autocast region, two forwards, a step between: the cached casts must not be stale."""
    with torch.autocast(run.device.type, torch.bfloat16):
        for _ in range(3):
            out = run.model(run.data(4, WIDTH)) + run.model(run.data(4, WIDTH))
            run.step(out.float().square().mean())
            torch.clear_autocast_cache()


def parametrized(kind: str):
    def build() -> Stack:
        model = Stack()
        for layer in model.layers:
            if kind == "weight_norm":
                layer.up = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
            elif kind == "spectral_norm":
                layer.up = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
            elif kind == "symmetric":
                parametrize.register_parametrization(layer.down, "weight", Symmetric())
        return model

    return build


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "symmetric"])
def test_parametrizations(kind, world):
    compare(world, parametrized(kind), lambda run: run.train(3))


@case(parametrized("symmetric"))
def test_parametrization_cached(run: Run):
    for _ in range(2):
        with parametrize.cached():
            run.step((run.model(run.data(4, WIDTH)) + run.model(run.data(4, WIDTH))).square().mean())


@case(stack())
def test_save_on_cpu(run: Run):
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            loss = run.model(run.data(4, WIDTH)).square().mean()
        run.step(loss)


@case(stack())
def test_saved_tensors_hooks_of_the_user(run: Run):
    """A hook around the model still sees what is saved, and its changes count."""
    seen = []

    def pack(t):
        seen.append(t.dtype)
        return t.to(torch.bfloat16) if t.is_floating_point() and t.shape == (4, WIDTH) else t

    def unpack(t):
        return t.float() if t.dtype is torch.bfloat16 else t

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = run.model(run.data(4, WIDTH)).square().mean()
        run.step(loss)
    assert seen


@case(stack())
def test_saved_tensors_hooks_inside(run: Run):
    """Opened and closed around single blocks."""

    def call(block, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return block(x)

    run.model.call = call
    run.train(2)
    run.model.call = lambda block, x: block(x)
    run.train(1)


@case(stack())
def test_disable_saved_tensors_hooks(run: Run):
    """Torch forbids hooks in this region; evaluation there must work."""
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), torch.no_grad():
        run.record("out", run.model(run.data(4, WIDTH)))
    run.train(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["forward", "module", "function"])
def test_compile(what, nvme_world):
    """A compiled block gives the compiled block's bits; compile ``block.forward`` and the hooks stay outside."""

    def script(run: Run) -> None:
        torch._dynamo.reset()
        for layer in run.model.layers if what != "function" else ():
            if what == "forward":
                layer.forward = torch.compile(layer.forward, backend="aot_eager")
            else:
                layer.compile(backend="aot_eager")
        if what == "function":
            run.model.call = torch.compile(lambda block, x: block(x), backend="aot_eager")
        run.train(3)

    compare(nvme_world, stack(depth=5), script)


class Lazy(nn.Module):
    """Materialised by a first call before the wrap."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(nn.LazyLinear(WIDTH) for _ in range(5))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def lazy() -> nn.Module:
    model = Lazy()
    model(torch.zeros(1, WIDTH))
    return model


@case(lazy)
def test_lazy_module_after_its_first_call(run: Run):
    run.train(3)


class Norms(nn.Module):
    """Layers of torch with kernels of their own."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.1) for _ in range(5)
        )

    def example(self, run):
        return run.data(2, 5, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case(Norms)
def test_torch_transformer_layers(run: Run):
    run.train(2)
    run.model.eval()
    with torch.inference_mode():
        run.record("fast path", run.model(run.data(2, 5, WIDTH)))
    run.model.train()
    run.train(1)


class Recurrent(nn.Module):
    """LSTM keeps flat lists of its weights."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(5))

    def example(self, run):
        return run.data(2, 3, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)[0]
        return x


# cuDNN's, on a GPU: weights of a storage each are no single piece (docs/limits.md)
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single:UserWarning")
@case(Recurrent)
def test_lstm(run: Run):
    run.train(3)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(5))

    def example(self, run):
        return run.data(1, WIDTH, 4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


@case(Convolutions)
def test_convolutions(run: Run):
    run.train(2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(5))

    def example(self, run):
        return run.data(2, 5, WIDTH)

    def forward(self, x):
        for layer in self.layers:  # reads out_proj.weight without calling out_proj
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


@case(Attention)
def test_multihead_attention(run: Run):
    run.train(3)


@case(lambda: nn.Sequential(*[Linear(WIDTH, WIDTH, True) for _ in range(6)]))
def test_sequential(run: Run):
    run.model.width = WIDTH
    run.train(3)


def test_double_precision_is_refused(host_world):
    run = Run(host_world, True)
    with pytest.raises(funicular.Error, match=r"FN-E112.*float64"):
        run.wrap(Decoder(True).double())
