"""What ends a block is not computed again for its backward, unless other code looks; then it has the value that it has in forward."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from conftest import DEVICE, make_world
from models import WIDTH, Linear, Stack
from mutations import break_
from sliced import compare
from twin import Mismatch, Run, World

INNER = 2 * WIDTH


@pytest.fixture(autouse=True)
def nothing_was_compiled(monkeypatch: pytest.MonkeyPatch):
    """Hide what other tests of this process compiled."""
    monkeypatch.setattr("funicular.micro_batches.skip_last.compilations", lambda: 0)


class Ending(nn.Module):
    """A block that ends in one of many ways; ``seen`` is what it could look at."""

    def __init__(self, end: Callable[..., Any], matmul: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.end, self.seen = end, []
        self.up = Linear(WIDTH, INNER, matmul, bias)
        self.down = Linear(INNER, WIDTH, matmul, bias)

    def forward(self, x: Tensor) -> Any:
        return self.end(self, x, self.down(F.silu(self.up(x))))

    def note(self, value: Tensor) -> None:
        self.seen.append(value.detach().clone().cpu())


def closed_over(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """A hook of the user's, which reads a result in backward."""
    seen = y.detach()
    x.register_hook(lambda grad: grad * seen.abs().mean()) if x.requires_grad else None
    return x + y


class Kept(torch.autograd.Function):
    """Saves its argument without running an operation of torch's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * y.abs().mean()


def written(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total.copy_(y)
    return total + x


def changed_before(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """What the product reads is changed after it, where autograd does not mind."""
    h = torch.ones_like(x)
    out = h + y
    h.mul_(3)
    block.note(out)
    return out * h


class Gate(torch.autograd.Function):
    """Keeps what it needs as many do, without ``save_for_backward``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.y = y
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.y.abs().mean(), None


def hooked(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """A hook of a tensor from before, which dies with the graph as the result does."""
    before = x * 1.5
    before.register_hook(lambda grad: grad * y.abs().mean())
    return before + y


def saved_to_disk(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """Torch's own example of hooks, which read before the operation that saves."""

    def pack(t: Tensor) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(t, file)
        return file

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda file: (file.seek(0), torch.load(file))[1]):
        return x * y


def other_memory(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """What a sum was made of is something else by the time the sum is read."""
    a = x * 1
    out = a + y
    a.data = x * 3
    return out * out


def discarded(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """Activations given up by hand, and made again in backward."""
    h = F.silu(block.up(x))
    out = block.down(h)
    h.untyped_storage().resize_(0)

    def again(grad: Tensor) -> None:
        h.untyped_storage().resize_(h.numel() * h.element_size())
        with torch.no_grad():
            h.data.copy_(F.silu(block.up(x)))

    out.register_hook(again)
    return x + out


def elsewhere(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    """The last product in another thread."""
    with ThreadPoolExecutor(1) as pool:
        out = x * pool.submit(lambda: block.down(F.silu(block.up(x)))).result()
        assert pool.submit(torch._C._len_torch_dispatch_stack).result() == 0
    return out


class Quantized(torch.Tensor):
    """Holds bytes and a scale."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Quantized:
        return torch.Tensor._make_wrapper_subclass(cls, weight.size(), dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().max() / 127
        self.bytes = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.t.default:
            return args[0].bytes.float().t() * args[0].scale
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.bytes.float() * a.scale if isinstance(a, Quantized) else a for a in args]
        return func(*plain, **(kwargs or {}))


def quantized(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    weight = Quantized(torch.linspace(-1, 1, WIDTH * WIDTH, device=x.device).view(WIDTH, WIDTH))
    return F.linear(x, weight) + y


def chosen(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    return x + y if y.sum().item() > 0 else x - y


def noted(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    out = x + y
    block.note(out)
    return out


def noted_data(block: Ending, x: Tensor, y: Tensor) -> Tensor:
    out = x + y
    block.seen.append(out.data)
    return out


ORDINARY: dict[str, Callable[..., Any]] = {
    "a sum": lambda block, x, y: x + y,
    "another order": lambda block, x, y: y + x,
    "sums": lambda block, x, y: (x + y) + (y + x),
    "a tuple": lambda block, x, y: (x + y, None),
    "a view": lambda block, x, y: (x.view(-1) + y.view(-1)).view(x.shape) + x,
    "two results": lambda block, x, y: (x + y, y),
    "the product": lambda block, x, y: y,
}
LOOKED: dict[str, Callable[..., Any]] = {
    "scaled": lambda block, x, y: x + 0.5 * y,
    "a weighted sum": lambda block, x, y: torch.add(x, y, alpha=2),
    "of another type": lambda block, x, y: x.double() + y,
    "broadcast": lambda block, x, y: x[:, :1] + y,
    "a scalar": lambda block, x, y: x + (y + 1),
    "used": lambda block, x, y: x * y,
    "a norm": lambda block, x, y: F.layer_norm(x + y, (WIDTH,)),
    "dropped": lambda block, x, y: x + F.dropout(y, 0.3),
    "in place": lambda block, x, y: y.add_(x),
    "cut": lambda block, x, y: (x + y)[..., : WIDTH // 2],
    "a product again": lambda block, x, y: x + F.linear(y, torch.ones(WIDTH, WIDTH, device=x.device)),
    "a function": lambda block, x, y: x + Kept.apply(y),
    "an argument": lambda block, x, y: x + Kept.apply(y.view(-1)).view(x.shape),
    "a checkpoint": lambda block, x, y: checkpoint(lambda y: x + y.exp(), y, use_reentrant=False),
    "written": written, "changed before": changed_before, "chosen": chosen, "noted": noted, "noted data": noted_data,
    "a closure": closed_over, "kept on a context": lambda block, x, y: Gate.apply(x, y) + y, "a hook of another": hooked,
    "saved to disk": saved_to_disk,
    "a list": lambda block, x, y: x + y * abs(y.tolist()[0][0][0]), "other memory": other_memory,
    "pickled": lambda block, x, y: x + y * pickle.loads(pickle.dumps(y)).abs().mean().item(),
    "printed": lambda block, x, y: x + y * len(repr(y)), "discarded": discarded, "elsewhere": elsewhere, "quantized": quantized,
    "sparse": lambda block, x, y: x + (torch.eye(len(x), device=x.device).to_sparse() @ y.flatten(1)).view(x.shape),
}  # fmt: skip


class Endings(Stack):
    """Blocks whose first result goes on to the next."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
            x = x if x.shape[-1] == WIDTH else F.pad(x, (0, WIDTH - x.shape[-1]))
            x = x.to(self.inp.weight.dtype)
        return self.out(x)


def endings(end: Callable[..., Any], **more: Any) -> Callable[[], Endings]:
    return lambda: Endings(lambda: Ending(end, **more), depth=3)


def steps(run: Run) -> None:
    for _ in range(3):
        run.step(run.model(run.data(4, 3, WIDTH)).square().mean())


def defers(run: Run) -> set[bool]:
    return {layer.__dict__["_call_impl"].defers for layer in run.model.layers}


@pytest.mark.covering(2)
@pytest.mark.parametrize("more", [{}, {"bias": True}, {"matmul": True}], ids=["linear", "bias", "matmul"])
@pytest.mark.parametrize("end", ORDINARY)
def test_nobody_looks(end: str, more: dict[str, bool], two_worlds):
    """The same bits, without the products; a result that is a view of another tensor could be looked at through that."""
    view = end in ("two results", "the product") and "bias" in more
    assert defers(compare(two_worlds, endings(ORDINARY[end], **more), steps)) == {not view}


@pytest.mark.covering(1)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("end", LOOKED)
def test_somebody_looks(end: str, bias: bool, host_world):
    """The same bits, and no further attempt."""
    assert defers(compare(host_world, endings(LOOKED[end], bias=bias), steps)) == {False}


class Frozen(Ending):
    """Without a graph a result may be kept, and read in backward."""

    def __init__(self) -> None:
        super().__init__(ORDINARY["a sum"])
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.last = last = self.down(F.silu(self.up(x.detach())))
        if x.requires_grad:
            x.register_hook(lambda grad: grad * last.abs().mean())
        return x + last


def test_without_a_graph_nothing_is_put_off(host_world):
    assert defers(compare(host_world, lambda: Endings(Frozen, depth=3), steps)) == {True}


@pytest.mark.parametrize("end", ["used", "a closure", "a function", "an argument"])
def test_the_comparison_can_fail(end: str, host_world):
    with break_("never_fill"), pytest.raises(Mismatch):
        compare(host_world, endings(LOOKED[end]), steps)


@pytest.mark.parametrize("end", [noted, noted_data])
def test_what_is_seen(end: Callable[..., Any], host_world):
    """Backward sees what forward saw."""
    run = Run(host_world, True)
    run.model = run.wrap(endings(end)(), activations={"micro_batch": 2})
    run.model(run.data(4, 3, WIDTH)).square().mean().backward()
    for layer in run.model.layers:
        first, second, again_second, again_first = (t.cpu() for t in layer.seen)
        assert torch.equal(first, again_first)
        assert torch.equal(second, again_second)


class Products(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


def test_read_past_torch(disk: str):
    """Another thread's look is not seen: what was not filled is NaN under poison. Any operation of this one before, and it is there."""
    if DEVICE == "cuda":
        pytest.skip("a kernel of one's own instead")

    def peek(block: Ending, x: Tensor, y: Tensor) -> Tensor:
        kept = y.detach() if block.asks else None
        with ThreadPoolExecutor(1) as pool:
            block.seen.append(pool.submit(lambda: y.sum().item()).result())
        return x + y if kept is None else x + kept + y - kept

    for asks in (False, True):
        run = Run(make_world("host", disk, False), True)
        model = endings(peek)()
        for layer in model.layers:
            layer.asks = asks
        run.model = run.wrap(model, activations={"micro_batch": 2})
        run.model(run.data(4, WIDTH)).square().mean().backward()
        for layer in run.model.layers:
            first, second, again_second, again_first = layer.seen
            assert (again_first == first and again_second == second) == asks
            assert math.isnan(again_first) != asks


def products(defer: bool, world: World) -> int:
    """How many products a backward computes."""
    run = Run(world, True)
    run.model = run.wrap(endings(ORDINARY["a sum"])(), activations={"micro_batch": 2})
    for layer in run.model.layers:
        layer.__dict__["_call_impl"].defers = defer
    loss = run.model(run.data(4, WIDTH)).square().mean()
    # Autograd's own thread would not be seen.
    with Products() as counter, torch.autograd.set_multithreading_enabled(False):
        loss.backward()
    assert defers(run) == {defer}
    return counter.count


def test_the_last_product_is_not_computed(host_world):
    """One for each slice of each block."""
    assert products(False, host_world) - products(True, host_world) == 2 * 3


def test_after_a_compiler_nothing_is_put_off(host_world, monkeypatch: pytest.MonkeyPatch):
    """Compiled code looks at modes and hooks, and would be compiled again."""
    monkeypatch.setattr("funicular.micro_batches.skip_last.compilations", lambda: 1)
    assert products(False, host_world) == products(True, host_world)
