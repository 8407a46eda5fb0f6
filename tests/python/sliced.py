"""Micro-batches in plain PyTorch: every block of a resident model over slices of its batch, all graphs kept.

Nothing is recomputed here and nothing is paged. A weight's gradients of the slices are summed in fp32, last slice first,
which is also the order of autograd's own sums, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from twin import Build, Run, Script, World, match, play


class Fan(torch.autograd.Function):
    """One weight, given to each of several slices."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, slices: int) -> tuple[Tensor, ...]:
        ctx.dtype = weight.dtype
        return tuple(weight.detach().clone() for _ in range(slices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[-1] if len(grads) == 1 else grads[-1].float()
        for grad in reversed(grads[:-1]):
            total = total + grad.float()
        return total.to(ctx.dtype), None


class Cut(torch.autograd.Function):
    """A tensor cut into slices; unlike ``torch.split``, zeros keep their sign in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> tuple[Tensor, ...]:
        return tuple(part.clone() for part in x.split(rows))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(grads), None


def slice_blocks(model: nn.Module, blocks: list[nn.Module], rows: int) -> nn.Module:
    """Have a plain model's blocks run over slices."""
    for block in blocks:
        block.forward = Sliced(block, block.forward, rows)
    return model


class Sliced:
    def __init__(self, block: nn.Module, forward: Callable[..., Any], rows: int) -> None:
        self.block, self.inner, self.rows = block, forward, rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() and not self.block.training:
            return self.inner(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batch = next(leaf.size(0) for leaf in leaves if isinstance(leaf, Tensor))
        count = -(-batch // self.rows)
        cut = [
            Cut.apply(leaf, self.rows)
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.size(0) == batch
            else [leaf] * count
            for leaf in leaves
        ]
        weights = {n: Fan.apply(p, count) if p.requires_grad else [p] * count for n, p in self.block.named_parameters()}
        results = []
        for i in range(count):
            inner_args, inner_kwargs = pytree.tree_unflatten([parts[i] for parts in cut], spec)
            lent = {name: parts[i] for name, parts in weights.items()}
            with _reparametrize_module(self.block, lent):
                results.append(self.inner(*inner_args, **inner_kwargs))
        flat = [pytree.tree_flatten(r) for r in results]
        joined = [
            torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*(f[0] for f in flat))
        ]
        return pytree.tree_unflatten(joined, flat[0][1])


def compare(
    world: World,
    build: Build,
    script: Script,
    rows: int = 2,
    blocks: Callable[[nn.Module], list[nn.Module]] = lambda m: list(m.layers),
    tier: str = "hbm",
    **sections: Any,
) -> Run:
    """Run a script on a plain model in plain micro-batches and on an offloaded one in its own; compare every bit."""

    def sliced() -> nn.Module:
        model = build()
        return slice_blocks(model, blocks(model), rows)

    plain = play(world, sliced, script, False, 3, {})
    sections["activations"] = {"micro_batch": rows, "tier": tier}
    paged = play(world, build, script, True, 3, sections)
    match(plain.notes, paged.notes)
    return paged


def close(world, build, shape, rows=2, tier="hbm"):
    """Loss and gradients of one backward, cut and whole: slices change the order of sums only."""

    def script(run: Run) -> None:
        loss = sum(t.square().mean() for t in as_tuple(run.model(run.data(*shape))))
        run.record("loss", loss)
        loss.backward()

    plain = play(world, build, script, False, 3, {})
    paged = play(world, build, script, True, 3, {"activations": {"micro_batch": rows, "tier": tier}})
    for (name, a), (other, b) in zip(plain.notes, paged.notes, strict=True):
        assert name == other
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item()), f"{name}: {(a - b).abs().max()}"


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)
