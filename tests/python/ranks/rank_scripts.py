"""What ranks run in these tests: scripts of comparisons, and functions that return what a test looks at."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from funicular.reference import ReferenceAdamW, backward_of_ranks
from models import CUDA, WIDTH, Block, Decoder, Stack
from several import Ranked, ordered
from sliced import slice_blocks
from twin import SEED

#: Where plain models compute, and the inputs of all are.
DEVICE = torch.device("cuda" if CUDA else "cpu")


def small(dtype: torch.dtype) -> nn.Module:
    """A model whose gradients have no zeros."""
    torch.manual_seed(SEED)
    return Stack(depth=2).to(DEVICE, dtype)


def batch(rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's input; ranks have different numbers of rows."""
    return torch.randn(3 + rank, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank)).to(DEVICE, dtype)


def loss_of(model: Any, rank: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """A rank's loss."""
    return model(batch(rank, step, dtype)).float().square().mean()


def all_with_ddp() -> list[list[torch.Tensor]]:
    """Train with DDP: in fp32 and bf16 with the ordered sum, and in fp32 with DDP's own."""
    return [with_ddp(torch.float32, True), with_ddp(torch.bfloat16, True), with_ddp(torch.float32, False)]


def with_ddp(dtype: torch.dtype, hook: bool) -> list[torch.Tensor]:
    """Train with DDP; gradients and weights."""
    model = small(dtype)
    wrapped = DistributedDataParallel(model)
    if hook:
        wrapped.register_comm_hook(None, lambda _, bucket: ordered(bucket))
    opt = ReferenceAdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(3):
        loss_of(wrapped, dist.get_rank(), step, dtype).backward()
        found += [p.grad.clone() for p in model.parameters()]
        opt.step()
        opt.zero_grad()
    return found + [p.detach().clone() for p in model.parameters()]


def as_reference(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same in one process."""
    model = small(dtype)
    opt = ReferenceAdamW(model.parameters(), lr=1e-2)
    found = []
    for step in range(3):
        backward_of_ranks(
            model.parameters(),
            [functools.partial(loss_of, model, r, step, dtype) for r in range(size)],
        )
        found += [p.grad.to("cpu", copy=True) for p in model.parameters()]
        opt.step()
        opt.zero_grad()
    return found + [p.detach().cpu() for p in model.parameters()]


#: Elements of a section are dealt in blocks of 8192: wide enough that every rank has some of each unit.
WIDE = 160


def wide(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Blocks of which each rank owns a part."""
    return Stack(block=lambda: Block(WIDE), depth=3, width=WIDE, **options).to(dtype)


def train(
    run: Ranked,
    model: str = "wide",
    steps: int = 2,
    accumulate: int = 1,
    clip: float = 0.0,
    to_none: bool = True,
    look: bool = True,
    dtype: torch.dtype = torch.float32,
    rows: int = 0,
    tier: str = "hbm",
    **options: Any,
) -> None:
    """Ordinary training; gradients are looked at in every second step only. ``rows``: of each micro-batch."""
    activations = {"activations": {"micro_batch": rows, "tier": tier}} if rows else {}
    run.model = run.wrap(BUILDS[model](dtype=dtype, **options), **activations)
    if rows and not run.offloaded:
        slice_blocks(run.model, list(run.model.layers), rows)
    run.opt = run.adamw()
    for step in range(steps):
        for _ in range(accumulate):
            run.backward(lambda rank: loss(run, rank, dtype))
        if clip:
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), clip))
        if look and step % 2:
            run.record_grads()
        run.opt.step()
        run.opt.zero_grad(set_to_none=to_none)


def loss(run: Ranked, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A rank's loss; ranks have different numbers of rows."""
    if hasattr(run.model, "example"):
        return run.model(run.tokens(rank, 2 + rank, 9))
    return run.model(run.data(rank, 3 + rank, run.model.width, dtype=dtype)).float().square().mean()


class Experts(nn.Module):
    """A unit of which a rank uses one part or the other, and a part that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDE
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(3)) for _ in range(2))
        self.out = nn.Linear(WIDE, WIDE)
        self.out.bias.requires_grad_(False)
        self.choice = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer[self.choice](x).tanh()
        return self.out(x)


BUILDS: dict[str, Any] = {
    "wide": wide,
    "decoder": functools.partial(Decoder, dropout=0.0, depth=3),
    "experts": lambda dtype: Experts().to(dtype),
}


def experts(run: Ranked, to_none: bool = True, clip: float = 0.0) -> None:
    """Parameters without a gradient on some ranks, and on all; frozen ones; a step in which other ranks use them."""
    run.model = run.wrap(Experts())
    run.opt = run.adamw()
    for step in range(4):

        def one(rank: int, step: int = step) -> torch.Tensor:
            run.model.choice = (rank + step) % 2 if step != 2 else 0
            return loss(run, rank)

        run.backward(one)
        if clip:
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), clip))
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad(set_to_none=to_none)


def skipping(run: Ranked) -> None:
    """Ranks that skip backwards: the last of a step, all of a step, and a step that nobody has a backward for."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    for ranks in ([0], None, [1], []):
        run.backward(lambda rank: loss(run, rank))
        run.backward(lambda rank: loss(run, rank), ranks)
        run.opt.step()
        run.record_grads()
        run.opt.zero_grad()
    run.backward(lambda rank: loss(run, rank), [0])
    run.step()
    run.step()


def two_optimizers(run: Ranked) -> None:
    """Two optimizers over parts of the model, of which one steps every second time."""
    run.model = run.wrap(wide())
    inner = list(run.model.layers.parameters())
    others = [p for p in run.model.parameters() if all(p is not q for q in inner)]
    run.opt = run.adamw(inner)
    second = run.adamw(others, lr=3e-2)
    for step in range(3):
        run.backward(lambda rank: loss(run, rank))
        run.opt.step()
        if step % 2:
            second.step()
            second.zero_grad()
        run.opt.zero_grad()


def looking(run: Ranked) -> None:
    """Gradients that are looked at, kept and cleared between backwards, clipped and read after it."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    p = run.model.layers[1].up.weight
    kept = []
    for step in range(3):
        run.backward(lambda rank: loss(run, rank))
        if step == 0:  # what is cleared in place is another tensor than the next gradient
            kept += [p.grad, p.grad[0]]
        run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), 0.01))
        if step != 1:
            run.record("clipped", p.grad.clone())
            run.record("sum", p.grad.sum())
        if step == 2:
            run.backward(lambda rank: loss(run, rank))  # is added to what was clipped, and shown
            run.record_grads()
        run.opt.step()
        run.record("after", p.grad)
        run.opt.zero_grad(set_to_none=step != 1)
        run.record("cleared", p.grad)
        if step == 1:
            run.record_grads()
    for i, tensor in enumerate(kept):
        run.record(f"kept {i}", tensor)


def cleared(run: Ranked) -> None:
    """Gradients that are zeros count in a step, and a norm."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    for step in range(3):
        run.backward(lambda rank: loss(run, rank))
        if step:
            run.model.zero_grad(set_to_none=False)
            run.model.zero_grad(set_to_none=False)
            run.record_grads()
        if step == 2:
            run.record("norm", nn.utils.clip_grad_norm_(run.model.parameters(), 0.01))
        run.opt.step()
        run.record_grads()
    run.backward(lambda rank: loss(run, rank))
    run.record_grads()
    run.step()


def rates(run: Ranked) -> None:
    """Learning rates that change between steps, and between backward and step; other numbers of backwards; a step that is taken twice."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    group = run.opt.param_groups[0]
    for step in range(6):
        for _ in range(1 + (step in (2, 3))):
            run.backward(lambda rank: loss(run, rank))
        if step == 4:
            group["lr"] *= 0.5
        run.opt.step()
        group["weight_decay"] *= 0.5
        if step == 1:
            run.opt.step()
        run.opt.zero_grad()


def states_written(run: Ranked) -> None:
    """Optimizer states that are loaded, and edited, between backward and step."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    for step in range(4):
        run.backward(lambda rank: loss(run, rank))
        if step:
            saved = run.opt.state_dict()
            for states in saved["state"].values():
                states["exp_avg"].mul_(0.5)
            run.opt.load_state_dict(saved)
        run.step()


def between(run: Ranked) -> None:
    """Rank 0 alone evaluates, reads and prints between backward and step, and after it, while the others go on."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    x = torch.ones(2, WIDE, device=run.device)
    for _ in range(3):
        run.backward(lambda rank: loss(run, rank))
        alone(run, x)
        run.step()
        alone(run, x)


def alone(run: Ranked, x: torch.Tensor) -> None:
    """What a script does on rank 0 alone; every rank notes it in the reference's place."""
    if run.rank in (None, 0):
        run.model.eval()
        with torch.no_grad():
            value = run.model(x).sum()
        run.model.train()
        state = sum(t.double().sum() for t in run.model.state_dict().values())
        weight = run.model.layers[0].up.weight.sum().detach()
        found = [value, state, weight]
    else:
        found = [None] * 3
    for i, one in enumerate(found):
        run.alone(f"alone {i}", one)


def differentiating(run: Ranked) -> None:
    """Rank 0 alone asks for gradients by ``torch.autograd.grad``, between backwards, before the step and in another thread."""
    run.model = run.wrap(wide())
    run.opt = run.adamw()
    x = torch.ones(2, WIDE, device=run.device)

    def ask() -> None:
        if run.rank in (None, 0):
            torch.autograd.grad(run.model(x).sum(), list(run.model.parameters()))

    for _ in range(2):
        for _ in range(2):
            other = threading.Thread(target=ask)
            other.start()
            run.backward(lambda rank: loss(run, rank))
            other.join()
            ask()
        run.record_grads()
        run.step()
