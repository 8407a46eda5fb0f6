"""The judge of every case: one script runs on a plain model and on an offloaded one, and every bit is compared.

A script takes a :class:`Run` and does what a user would: forward, backward, step, edits, exceptions. It never asks
which of the two it drives. ``Run.record`` notes what it sees; at the end all parameters, gradients and buffers are
noted too. :func:`compare` runs the script twice and raises :class:`Mismatch` at the first difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import funicular
from funicular._core import ALIGN_ELEMENTS
from funicular.reference import ReferenceAdamW
from models import CUDA

SEED = 20240611
#: Frames of the compute tier, in units of the largest unit, that most cases get; their models have more units.
FRAMES = 3


class Mismatch(AssertionError):
    """The offloaded run differs from the plain one."""


@dataclass(frozen=True)
class World:
    """What a test runs on: device, placement, I/O engine, disk."""

    device: str
    paths: tuple[str, ...]
    params: str = "host"
    optimizer: str = "host"
    engine: str = "threads"
    poison: bool = True
    gradients: str = "auto"
    spare: str = "auto"
    faults: str = ""
    #: the budget of host memory, of which a little makes pieces of updates small; ample without one
    host: str = ""

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cuda" if self.device == "cuda" else "cpu")

    @property
    def granularity(self) -> int:
        return 2 << 20 if self.device == "cuda" else 4096

    def policy(self, model: nn.Module, frames: float = FRAMES, **sections: Any) -> dict[str, Any]:
        """A policy whose compute tier holds ``frames`` of the model's units; ``sections`` override parts of it."""
        largest = max(unit_bytes(model))
        hbm = int(frames * -(-largest // self.granularity)) * self.granularity
        roomy = "2GiB" if CUDA else "64MiB"  # the models are wider there, also where this world's device is the host
        policy: dict[str, Any] = {
            "device": self.device,
            "budget": {"hbm": f"{hbm}B", "host": self.host or roomy, "nvme": roomy},
            "nvme": {"paths": list(self.paths), "engine": self.engine},
            "params": {"tier": self.params},
            "optimizer": {"tier": self.optimizer, "spare": self.spare},
            "gradients": {"tier": self.gradients},
            "debug": {"poison": self.poison, "faults": self.faults},
        }
        return merge(policy, sections)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the entries of ``over``; tables are merged, a ``None`` removes."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge(out[key], value)
        else:
            out[key] = value
    return out


def unit_bytes(model: nn.Module) -> list[int]:
    """Bytes of the units as the wrapper would cut them: the blocks of the largest ModuleList, and the rest."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    blocks = list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))
    seen: set[int] = set()
    sizes = []
    for parameters in [*(b.parameters() for b in blocks), model.parameters()]:
        sections: dict[tuple[torch.dtype, bool], int] = {}
        for p in parameters:
            if id(p) not in seen:
                seen.add(id(p))
                key = (p.dtype, p.requires_grad)
                sections[key] = (
                    sections.get(key, 0) + -(-p.numel() // ALIGN_ELEMENTS) * ALIGN_ELEMENTS * p.element_size()
                )
        sizes.append(sum(-(-size // 4096) * 4096 for size in sections.values()))
    return [size for size in sizes if size] or [4096]


@dataclass
class Run:
    """One side of a comparison."""

    world: World
    offloaded: bool
    model: nn.Module = None  # type: ignore[assignment]
    opt: torch.optim.Optimizer = None  # type: ignore[assignment]
    notes: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        self.generator = torch.Generator().manual_seed(SEED + 1)

    @property
    def device(self) -> torch.device:
        return self.world.torch_device

    def wrap(self, model: nn.Module, frames: float = FRAMES, **sections: Any) -> Any:
        """Offload it on the offloaded side, put it on the device on the other."""
        if self.offloaded:
            same = funicular.offload(model, self.world.policy(model, frames, **sections))
            assert same is model
            return same
        return model.to(self.device)

    def adamw(self, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        """This project's AdamW, or the plain optimizer of the same bits."""
        options = {"lr": 1e-2, "weight_decay": 0.1} | options
        cls = funicular.AdamW if self.offloaded else ReferenceAdamW
        return cls(self.model.parameters() if params is None else params, **options)

    def data(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, the same on both sides."""
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)

    def tokens(self, *shape: int, below: int = 31) -> Tensor:
        """Indices, the same on both sides."""
        return torch.randint(below, shape, generator=self.generator).to(self.device)

    def record(self, label: str, value: Any) -> None:
        """Note tensors, numbers, or any nest of them."""
        leaves, _ = pytree.tree_flatten(value)
        for i, leaf in enumerate(leaves):
            note = leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf
            self.notes.append((f"{label}[{i}]" if len(leaves) > 1 else label, note))

    def record_grads(self) -> None:
        """Note every parameter's gradient, or that it has none."""
        for name, p in self.model.named_parameters(remove_duplicate=False):
            self.record(f"{name}.grad", p.grad)

    def record_weights(self, model: nn.Module | None = None) -> None:
        """Note every parameter and buffer."""
        model = self.model if model is None else model
        for name, p in model.named_parameters(remove_duplicate=False):
            self.record(name, p)
        for name, b in model.named_buffers(remove_duplicate=False):
            self.record(name, b)

    def step(self, loss: Tensor, look: bool = True) -> None:
        """Backward, update, clear; ``look`` notes the gradients in between."""
        self.record("loss", loss)
        loss.backward()
        if look:
            self.record_grads()
        self.opt.step()
        self.opt.zero_grad()

    def train(self, steps: int = 3, look: bool = True, **call: Any) -> None:
        """Ordinary steps on inputs of the model's own making, else on normal numbers."""
        for _ in range(steps):
            x = self.model.example(self) if hasattr(self.model, "example") else self.data(4, self.model.width)
            self.step(to_loss(self.model(x, **call)), look)


def to_loss(out: Any) -> Tensor:
    """A scalar that depends on every float tensor of an output."""
    terms = [
        t.float().square().mean() for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return torch.stack(terms).sum()


Script = Callable[[Run], None]
Build = Callable[[], nn.Module]


def play(
    world: World, build: Build | None, script: Script, offloaded: bool, frames: float, sections: dict[str, Any]
) -> Run:
    """Run a script on one side, to the end."""
    assert build is not None or not sections, "a script that wraps its model itself would not get them"
    run = Run(world, offloaded)
    if build is not None:
        run.model = run.wrap(build(), frames, **sections)
        run.opt = run.adamw()
    script(run)
    if run.model is not None:
        run.record_grads()
        run.record_weights()
    return run


def compare(world: World, build: Build | None, script: Script, frames: float = FRAMES, **sections: Any) -> Run:
    """Run a script on both sides and compare every note; gives the offloaded run."""
    plain = play(world, build, script, False, frames, sections)
    paged = play(world, build, script, True, frames, sections)
    match(plain.notes, paged.notes)
    return paged


def match(plain: list[tuple[str, Any]], paged: list[tuple[str, Any]]) -> None:
    """Raise :class:`Mismatch` unless both sides noted the same."""
    for i, ((name, a), (other, b)) in enumerate(zip(plain, paged)):
        if name != other:
            raise Mismatch(f"note {i}: plain noted {name}, offloaded {other}")
        if not same(a, b):
            raise Mismatch(f"note {i}, {name}: {difference(a, b)}")
    if len(plain) != len(paged):
        raise Mismatch(f"plain made {len(plain)} notes, offloaded {len(paged)}")
    if not plain:
        raise Mismatch("nothing was noted")


def same(a: Any, b: Any) -> bool:
    """Equal bits, the sign of zero too; any NaN equals any NaN, and nothing equals something of another type or shape."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and (a == b or (a != a and b != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    return bool(((bits(a) == bits(b)) | (a.isnan() & b.isnan())).all())


def bits(a: Tensor) -> Tensor:
    """Integers of the same bits: tells -0.0 from 0.0."""
    return a.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()])


def difference(a: Any, b: Any) -> str:
    """Where two values differ, for people."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        show = [f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else repr(v) for v in (a, b)]
        return f"plain {show[0]}, offloaded {show[1]}"
    gap = (a.double() - b.double()).abs().nan_to_num(0.0, 0.0)
    wrong = int((bits(a) != bits(b)).sum()) if a.is_floating_point() else int((a != b).sum())
    most = gap.max().item() if gap.numel() else 0.0
    return f"{wrong} of {a.numel()} elements differ, by at most {most:.3e}, {int(b.isnan().sum())} NaN"


def case(
    build: Build | None = None, frames: float = FRAMES, **sections: Any
) -> Callable[[Script], Callable[[World], None]]:
    """Turn a script into a test that is right only if both sides agree in every bit."""

    def decorate(script: Script) -> Callable[[World], None]:
        def test(world: World) -> None:
            compare(world, build, script, frames, **sections)

        test.__name__ = test.__qualname__ = script.__name__
        test.__doc__, test.__module__ = script.__doc__, script.__module__
        return test

    return decorate


def loud(world: World, build: Build | None, script: Script, **sections: Any) -> str:
    """For documented limits: ``exact``, ``refused`` (a named error) or ``poisoned`` (not finite where plain is); else raise."""
    plain = play(world, build, script, False, FRAMES, {})
    try:
        paged = play(world, build, script, True, FRAMES, merge({"debug": {"poison": True}}, sections))
    except funicular.Error:
        return "refused"
    try:
        match(plain.notes, paged.notes)
    except Mismatch:
        if finite(plain.notes) and not finite(paged.notes):
            return "poisoned"
        raise
    return "exact"


def finite(notes: list[tuple[str, Any]]) -> bool:
    """True if no noted number is NaN or infinite."""
    return all(bool(v.isfinite().all()) for _, v in notes if isinstance(v, Tensor))
