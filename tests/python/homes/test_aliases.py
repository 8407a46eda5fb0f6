"""Weights seen or edited past torch's version counters: numpy, raw addresses, fused and custom kernels, views that live on.

Plain PyTorch shows every such edit at once, since there is one memory. Each case is exact here too, or an error by name.
"""

import ctypes
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn

import funicular
from models import CUDA, WIDTH, Decoder, Stack, stack
from twin import Run, case, compare, loud

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"fused": True}),
    "adamw": (torch.optim.AdamW, {"fused": True, "lr": 1e-2}),
    "adamw_foreach": (torch.optim.AdamW, {"foreach": True, "lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"fused": True, "lr": 0.1, "momentum": 0.9}),
    "adagrad": (torch.optim.Adagrad, {"fused": not CUDA, "lr": 0.1}),  # torch has no fused one for GPUs
    "rmsprop": (torch.optim.RMSprop, {}),
    "rprop": (torch.optim.Rprop, {}),
    "asgd": (torch.optim.ASGD, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adadelta": (torch.optim.Adadelta, {}),
}
if hasattr(torch.optim, "Adafactor"):  # not before torch 2.5
    OPTIMIZERS["adafactor"] = (torch.optim.Adafactor, {})


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers(name, world):
    """Their updates reach every window, with one unit per frame and with a ring that holds everything."""
    kind, options = OPTIMIZERS[name]

    def script(run: Run) -> None:
        run.opt = kind(run.model.parameters(), **options)
        run.train(3)

    compare(world, stack(), script)
    compare(world, stack(depth=3), script, frames=40)


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_in_a_hook(fused, world):
    """A step per parameter as soon as its gradient is there, inside the backward's windows."""

    def script(run: Run) -> None:
        opts = {p: torch.optim.AdamW([p], lr=1e-2, fused=fused, foreach=False) for p in run.model.parameters()}

        def step(p, opts=opts):
            opts[p].step()
            opts[p].zero_grad()

        handles = [p.register_post_accumulate_grad_hook(step) for p in run.model.parameters()]
        for _ in range(3):
            loss = run.model(run.data(4, WIDTH)).square().mean()
            run.record("loss", loss)
            loss.backward()
        for handle in handles:
            handle.remove()
        opts.clear()

    compare(world, stack(), script)


def numpy_of(p):
    return p.detach().numpy()


def dlpack_of(p):
    return np.from_dlpack(p.detach())


def storage_of(p):
    return np.frombuffer(
        (ctypes.c_byte * (4 * p.numel())).from_address(p.untyped_storage().data_ptr() + 4 * p.storage_offset()),
        dtype=np.float32,
    ).reshape(p.shape)


def pointer_to(p):
    return np.frombuffer((ctypes.c_byte * (4 * p.numel())).from_address(p.data_ptr()), dtype=np.float32).reshape(
        p.shape
    )


ALIASES = {
    "numpy": numpy_of,
    "data_numpy": lambda p: p.data.numpy(),
    "array": lambda p: np.asarray(p.detach()),
    "view_numpy": lambda p: p.detach()[1:].numpy(),
    "dlpack": dlpack_of,
    "from_dlpack": lambda p: torch.from_dlpack(p.detach()).data,
    "data": lambda p: p.data.view(-1),
    "storage": lambda p: torch.empty(0).set_(p.untyped_storage(), p.storage_offset(), p.size(), p.stride()),
    "data_ptr": pointer_to,
}
WHEN = ["between", "before_backward", "before_step", "right_after_step"]


def scale(alias, by=0.5):
    if isinstance(alias, torch.Tensor):
        alias.data.mul_(by)
    else:
        alias *= by


@pytest.mark.covering(2)
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("kind", ALIASES)
def test_alias_kept_and_edited(kind, when, two_worlds):
    """An alias taken once, edited several times later, at one point of the step."""
    if two_worlds.device == "cuda":
        pytest.skip("numpy sees only the CPU")

    def script(run: Run) -> None:
        params = [run.model.layers[i].up.weight for i in (0, 2, 3)] + [run.model.layers[1].norm.bias]
        aliases = [ALIASES[kind](p) for p in params if kind != "view_numpy" or p.dim() > 1]
        for i in range(4):
            if when == "between" and i != 2:
                [scale(a) for a in aliases]
            loss = run.model(run.data(4, WIDTH)).square().mean()
            run.record("loss", loss)
            if when == "before_backward" and i != 1:
                [scale(a) for a in aliases]
            loss.backward()
            run.record_grads()
            if when == "before_step" and i % 2:
                [scale(a) for a in aliases]
            run.opt.step()
            if when == "right_after_step" and i % 2 == 0:
                [scale(a) for a in aliases]
            run.opt.zero_grad()
            run.record("alias", [torch.as_tensor(np.asarray(a)) for a in aliases])
        run.record_weights()
        del aliases
        run.train(2)

    compare(two_worlds, stack(), script)
    compare(two_worlds, stack(), script, frames=40)


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", ["numpy", "data", "from_dlpack"])
@pytest.mark.parametrize("steps", [1, 3])
def test_alias_edited_and_dropped(kind, steps, world):
    """Several steps without an edit, one edit, and the alias is gone before anything looks."""
    if world.device == "cuda":
        pytest.skip("numpy sees only the CPU")

    def script(run: Run) -> None:
        run.train(1)
        alias = ALIASES[kind](run.model.layers[2].up.weight)
        run.train(steps)
        scale(alias)
        del alias
        run.train(2)

    compare(world, stack(), script)


@case(stack())
def test_alias_edited_before_eval(run: Run):
    with torch.no_grad():
        run.record("before", run.model(run.data(4, WIDTH)))
        alias = run.model.layers[1].up.weight.detach()
        for _ in range(3):
            alias.data.mul_(0.5)
            run.record("after", run.model(run.data(4, WIDTH)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alias_of_a_split_master(dtype, world):
    """An edit past the version counter counts as an edit for the master."""

    def script(run: Run) -> None:
        run.train(2)
        p = run.model.layers[1].up.weight
        alias = p.detach()
        if run.offloaded:
            alias.data.mul_(0.5)
        else:
            with torch.no_grad():
                p.mul_(0.5)
        run.train(2)
        if run.offloaded:
            alias.data.mul_(0.5)
        else:
            with torch.no_grad():
                p.mul_(0.5)
        del alias
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alias_that_is_only_read(dtype, world):
    """A look, however long, does not make the master start anew."""

    def script(run: Run) -> None:
        run.train(2)
        kept = [p.detach() for p in run.model.parameters()]
        state = run.model.state_dict()
        run.train(2)
        run.record("kept", kept)
        run.record("state", dict(state))
        del kept, state
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


def before(module, act):
    """Run something in a module's forward, before anything else in it."""

    def hook(*_):
        act()

    return module.register_forward_pre_hook(hook)


SWAPS = {
    "set_": lambda p, t: p.set_(t),
    "set_storage": lambda p, t: p.set_(t.untyped_storage(), 0, p.size(), p.stride()),
    "resize_": lambda p, t: p.resize_(p.numel() // 2),
    "swap_tensors": lambda p, t: torch.utils.swap_tensors(p, nn.Parameter(t)),
    "class_data": lambda p, t: torch.Tensor.data.__set__(p, t),
    "copy_out": lambda p, t: torch.add(t, 0.0, out=p.data),
    "init": lambda p, t: nn.init.zeros_(p),
    "transpose": lambda p, t: p.t_(),
    "share": lambda p, t: p.share_memory_(),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("phase", ["outside", "inside"])
@pytest.mark.parametrize("how", SWAPS)
def test_storage_replaced(how, phase, world):
    """``set_``, ``swap_tensors`` and their like: exact, or refused by name."""

    def script(run: Run) -> None:
        run.train(1)
        p = run.model.layers[2].up.weight
        t = run.data(*p.shape) / 8
        with torch.no_grad():
            if phase == "outside":
                SWAPS[how](p, t)
            else:
                hook = before(run.model.layers[2], lambda: SWAPS[how](p, t))
                run.model(run.data(4, WIDTH))
                hook.remove()
        run.record_weights()
        run.train(2)

    if how == "resize_":
        run = Run(world, True)
        run.model = run.wrap(Stack())
        with pytest.raises((funicular.Error, RuntimeError)), torch.no_grad():
            run.model.layers[2].up.weight.resize_(3)
        run.model(run.data(4, WIDTH)).sum().backward()
        return
    assert loud(world, stack(), script) in {"exact", "refused"}


@pytest.mark.parametrize("swap", [True, False])
def test_load_state_dict_that_swaps(swap, world):
    """``torch.__future__.set_swap_module_params_on_conversion``."""

    def script(run: Run) -> None:
        run.train(1)
        other = {k: v * 0.5 for k, v in run.model.state_dict().items()}
        torch.__future__.set_swap_module_params_on_conversion(swap)
        try:
            run.model.load_state_dict(other)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        run.record_weights()
        run.train(2)

    if not swap:
        compare(world, stack(), script)
        return
    with pytest.raises(RuntimeError, match="FN-E115"):
        compare(world, stack(), script)


torch.library.define("funicular_test::halve_", "(Tensor(a!) x) -> ()")


@torch.library.impl("funicular_test::halve_", "CompositeExplicitAutograd")
def _halve(x):
    with torch._C._AutoDispatchBelowAutograd():
        x.mul_(0.5)


def _put(p: torch.Tensor) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # torch has no deterministic one on GPUs; one element is
    p.put_(torch.tensor([0], device=p.device), torch.tensor([9.0], device=p.device))
    torch.use_deterministic_algorithms(deterministic)


CUSTOM = {
    "library": lambda ps: [torch.ops.funicular_test.halve_(p) for p in ps],
    "foreach": lambda ps: torch._foreach_mul_(ps, 0.5),
    "foreach_list": lambda ps: torch._foreach_copy_(ps, [p.detach() * 0.5 for p in ps]),
    "amp": lambda ps: torch._amp_foreach_non_finite_check_and_unscale_(
        ps, torch.zeros((), device=ps[0].device), torch.full((), 0.5, device=ps[0].device)
    ),
    "apply": lambda ps: (
        [p.data.apply_(lambda a: a * 0.5) for p in ps] if ps[0].device.type == "cpu" else [p.mul_(0.5) for p in ps]
    ),
    "put": lambda ps: [_put(p) for p in ps],
    "index_fill": lambda ps: [p.index_fill_(0, torch.tensor([0], device=p.device), 0.5) for p in ps],
    "out": lambda ps: [torch.mul(p, 0.5, out=p) for p in ps],
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", CUSTOM)
def test_kernels_that_edit(how, world):
    def script(run: Run) -> None:
        for _ in range(3):
            with torch.no_grad():
                CUSTOM[how]([run.model.layers[i].up.weight for i in (0, 1, 2)])
            run.train(1)

    compare(world, stack(), script)
    compare(world, stack(depth=4), script, frames=40)


@case(stack())
def test_weights_of_the_plain_class(run: Run):
    """What is behind the parameter's own class is no place to hide."""
    run.train(1)
    p = run.model.layers[2].up.weight
    t = p.as_subclass(torch.Tensor)
    with torch.no_grad():
        t.mul_(0.5)
        run.record("now", run.model(run.data(4, WIDTH)))
        torch.Tensor.data.__get__(p).mul_(0.5)
        run.record("now", run.model(run.data(4, WIDTH)))
        nn.Parameter(p.data, requires_grad=False).mul_(0.5)
        run.record("now", run.model(run.data(4, WIDTH)))
    run.train(1)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counted", [True, False])
def test_edit_then_unwrap(dtype, counted, world):
    """An edit that no step has seen yet survives ``unwrap``, master included."""

    def script(run: Run) -> None:
        run.train(2)
        p = run.model.layers[1].up.weight
        if counted or not run.offloaded:
            with torch.no_grad():
                p.mul_(0.5)
        else:
            p.data.mul_(0.5)
        if run.offloaded:
            funicular.unwrap(run.model)
        run.train(2)

    compare(world, lambda: Decoder(dtype=dtype), script)


@pytest.mark.parametrize("what", ["state_dict", "view", "inside"])
def test_weights_sent_to_another_process(what, world):
    """torch moves what it sends into shared memory, away from under the model: an error by name, once, and training goes on."""
    if world.device == "cuda":
        pytest.skip("what is sent from a GPU stays where it is")

    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            p = run.model.layers[2].up.weight
            if what == "inside":
                hook = before(run.model.layers[2], lambda: ForkingPickler.dumps(p.detach()))
            else:
                ForkingPickler.dumps(run.model.state_dict() if what == "state_dict" else p.detach()[1:])
            for _ in range(len(list(run.model.modules()))):
                try:
                    with torch.no_grad():
                        run.model(torch.zeros(4, WIDTH))
                    break
                except funicular.UsageError as error:
                    assert "FN-E115" in str(error)
                    assert "shared memory" in str(error)
                    if what == "inside":
                        hook.remove()
            else:
                pytest.fail("never usable again")
        run.record_weights()
        run.train(2)

    compare(world, stack(), script)


@case(stack())
def test_weights_pickled_for_another_process(run: Run):
    """Parameters and gradients themselves are sent as copies."""
    run.model(run.data(4, WIDTH)).square().mean().backward()
    if run.offloaded:
        for p in run.model.parameters():
            ForkingPickler.dumps(p)
            ForkingPickler.dumps(p.grad)
            ForkingPickler.dumps(p.grad.detach())
    run.opt.step()
    run.train(2)


@case(stack())
def test_parametrized_after_the_offload(run: Run):
    run.train(1)

    class Scaled(nn.Module):
        def forward(self, w):
            return w * 0.5

        def right_inverse(self, w):
            return w * 2

    for i in (1, 3):
        nn.utils.parametrize.register_parametrization(run.model.layers[i].up, "weight", Scaled())
    run.train(2)
    nn.utils.parametrize.remove_parametrizations(run.model.layers[1].up, "weight")
    run.opt = run.adamw()
    run.train(2)
