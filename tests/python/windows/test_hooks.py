"""Hooks of the user: order, what they see, what they change, and that they stay."""

import pytest
import torch
from torch import nn

from models import WIDTH, Stack, stack
from twin import Run, case, compare

# Torch says so of the first layer, whose input needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def spread(model: Stack) -> list[nn.Module]:
    return [model, model.inp, model.layers[0], model.layers[1], model.layers[1].up, model.layers[3], model.out]


def see(run: Run, label: str, module: nn.Module) -> None:
    """Note the module's own weights, through every hook that looks at them."""
    run.record(label, [p.detach().clone() for p in module.parameters(recurse=False)])


@pytest.mark.covering(2)
@pytest.mark.parametrize("wrapped_first", [True, False], ids=["after wrap", "before wrap"])
@pytest.mark.parametrize("prepend", [True, False])
def test_forward_hooks_see_weights(prepend, wrapped_first, world):
    def script(run: Run) -> None:
        model = Stack()
        if wrapped_first:
            run.model = run.wrap(model)
        for i, m in enumerate(spread(model)):
            m.register_forward_pre_hook(lambda m, a, i=i: see(run, f"pre {i}", m), prepend=prepend)
            m.register_forward_hook(lambda m, a, o, i=i: see(run, f"post {i}", m), prepend=prepend)
        run.model = model if wrapped_first else run.wrap(model)
        run.opt = run.adamw()
        run.train(2)

    compare(world, None, script)


@case(stack())
def test_hooks_with_keywords(run: Run):
    order = []
    for i, m in enumerate(spread(run.model)):
        m.register_forward_pre_hook(lambda m, a, k, i=i: order.append(("pre", i, len(a), len(k))), with_kwargs=True)
        m.register_forward_hook(lambda m, a, k, o, i=i: order.append(("post", i)), with_kwargs=True)
        m.register_forward_hook(lambda m, a, o, i=i: order.append(("always", i)), always_call=True)
    run.train(2)
    run.record("order", order)


@case(stack())
def test_hooks_that_replace(run: Run):
    """New inputs and new outputs, some of them views of weights."""
    run.model.layers[1].register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
    run.model.layers[2].register_forward_hook(lambda m, a, o: o + m.up.weight.mean(0))
    run.model.layers[3].register_forward_hook(lambda m, a, o: o @ m.down.weight.t())
    run.train(3)


@case(stack())
def test_hooks_that_edit(run: Run):
    """A pre-hook changes the weights just before use."""

    def halve(module, args):
        with torch.no_grad():
            module.up.weight.mul_(0.9)

    run.model.layers[2].register_forward_pre_hook(halve)
    run.model.layers[3].register_forward_pre_hook(halve, prepend=True)
    run.train(3)


@case(stack())
def test_backward_hooks(run: Run):
    """Full backward hooks see gradients and weights; one of them scales."""
    for i, m in enumerate(spread(run.model)):
        m.register_full_backward_pre_hook(lambda m, g, i=i: run.record(f"pre {i}", g))
        m.register_full_backward_hook(lambda m, gi, go, i=i: run.record(f"post {i}", [*gi, *go]))
    run.model.layers[3].register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    run.train(2)


@case(stack())
def test_backward_hooks_see_weights(run: Run):
    for i, m in enumerate(spread(run.model)[1:]):
        m.register_full_backward_hook(lambda m, gi, go, i=i: see(run, f"weights {i}", m))
    run.train(2)


@case(stack())
def test_tensor_hooks_on_parameters(run: Run):
    """Called with the gradient before it is accumulated; may replace it."""
    for i, p in enumerate(run.model.parameters()):
        p.register_hook(lambda g, i=i: run.record(f"hook {i}", g))
        if i % 3 == 0:
            p.register_hook(lambda g: g * 0.5)
    run.train(2)


@case(stack())
def test_post_accumulate_hooks(run: Run):
    """``p.grad`` is the sum so far, and may be changed."""

    def note(p):
        run.record("grad", p.grad)
        p.grad.mul_(0.5)

    for p in run.model.layers[2].parameters():
        p.register_post_accumulate_grad_hook(note)
    for _ in range(2):
        for _ in range(2):
            run.model(run.data(4, WIDTH)).square().mean().backward()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_gradients_cleared_as_they_come(run: Run):
    """GaLore-like: the hook takes the gradient and sets it to None."""
    taken = {}

    def take(p):
        taken[id(p)] = p.grad.clone()
        p.grad = None

    handles = [p.register_post_accumulate_grad_hook(take) for p in run.model.parameters()]
    for _ in range(2):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        for p in run.model.parameters():
            assert p.grad is None
            p.grad = taken.pop(id(p))
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()
    for handle in handles:
        handle.remove()
    run.train(1)


@case(stack())
def test_hooks_on_activations(run: Run):
    def forward_hook(module, args, out):
        out.register_hook(lambda g: run.record("activation", g))
        out.retain_grad()
        return out

    run.model.layers[1].register_forward_hook(forward_hook)
    run.model.layers[3].register_forward_hook(forward_hook)
    run.train(2)


@case(stack())
def test_hooks_removed(run: Run):
    handles = [m.register_forward_hook(lambda m, a, o: o * 0.5) for m in run.model.layers]
    run.train(1)
    for handle in handles[::2]:
        handle.remove()
    run.train(2)


@case(stack())
def test_hooks_added_and_removed_inside(run: Run):
    def once(module, args, out):
        handle.remove()
        return out * 2

    handle = run.model.layers[3].register_forward_hook(once)
    run.train(3)


@case(stack())
def test_global_hooks(run: Run):
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: names.append(type(m).__name__))
    run.train(1)
    handle.remove()
    run.record("names", names)


@case(stack())
def test_state_dict_hooks(run: Run):
    run.model.register_state_dict_post_hook(lambda m, s, p, l: s.update({"extra": torch.ones(1)}))
    run.train(1, look=False)
    run.record("state", dict(run.model.state_dict()))


@case(stack())
def test_graph_hooks(run: Run):
    """Multi-grad hooks and hooks on the graph's nodes."""
    calls = []
    params = list(run.model.layers[2].parameters())
    torch.autograd.graph.register_multi_grad_hook(params, lambda g: calls.append(len(g)))
    out = run.model(run.data(4, WIDTH)).square().mean()
    out.grad_fn.register_prehook(lambda g: calls.append("node"))
    run.step(out)
    run.record("calls", calls)


def test_ours_go_with_unwrap(host_world):
    """The user's hooks stay, ours are gone."""
    import funicular

    run = Run(host_world, True)
    model = Stack()
    counts = lambda: [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    ]
    before = counts()
    run.model = run.wrap(model)
    model.layers[0].register_forward_hook(lambda m, a, o: None)
    funicular.unwrap(model)
    after = counts()
    assert sum(after) == sum(before) + 1
