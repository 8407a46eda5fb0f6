"""What ranks run in these tests besides comparisons: functions that return what a test looks at."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_scripts import DEVICE, WIDE, wide
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import funicular
from several import fully_shard
from twin import SEED, World


def offloaded(world: World, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An offloaded model, and its optimizer."""
    torch.manual_seed(SEED)
    model = wide(**options)
    funicular.offload(model, world.policy(model))
    return model, funicular.AdamW(model.parameters(), lr=1e-2)


def own_batch(step: int, rank: int | None = None) -> torch.Tensor:
    """This rank's input of a step."""
    rank = dist.get_rank() if rank is None else rank
    return torch.randn(2, WIDE, generator=torch.Generator().manual_seed(1000 * step + rank)).to(DEVICE)


def message(call: Any) -> str:
    """What a call raises."""
    try:
        call()
    except (funicular.Error, RuntimeError) as error:  # torch wraps what happens in load_state_dict
        return str(error)
    return "nothing"


def other_rate(world: World) -> list[str]:
    """A step with another learning rate on rank 1; and the next one, with the same."""
    model, opt = offloaded(world)
    opt.param_groups[0]["lr"] = 1e-2 * (1 + dist.get_rank())
    model(own_batch(0)).sum().backward()
    before = model.out.weight.detach().clone()
    said = [message(opt.step)]
    said.append(str(torch.equal(before, model.out.weight)))
    opt.param_groups[0]["lr"] = 1e-2
    return [*said, message(opt.step)]


def added(world: World) -> list[str]:
    """A layer that comes into the model after ``offload``: trained, frozen, and in an evaluation; the model's own weights are trained on."""
    model, opt = offloaded(world)
    model.extra = nn.Linear(WIDE, WIDE, device=DEVICE)

    def train() -> None:
        model.extra(model(own_batch(0))).sum().backward()
        opt.step()

    said = [message(train)]
    with torch.no_grad():
        said.append(message(lambda: model(own_batch(0))))
    model.extra.requires_grad_(False)
    return [*said, message(train)]


def other_clip(world: World) -> list[str]:
    """Another limit of the norm on rank 1."""
    model, opt = offloaded(world)
    model(own_batch(0)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01 * (1 + dist.get_rank()))
    said = message(opt.step)
    # A GPU finds the factor while the program goes on: what needs the weights says so.
    return [message(lambda: model.out.weight.sum().item()) if said == "nothing" and DEVICE.type == "cuda" else said]


def other_model(world: World) -> list[str]:
    """Another width of one layer on rank 1; another policy; another type."""
    said = []
    for kind in range(3):
        model = wide(torch.bfloat16 if kind == 2 and dist.get_rank() else torch.float32)
        if kind == 0 and dist.get_rank():
            model.out = nn.Linear(WIDE, 7)
        policy = world.policy(model, **({"debug": {"poison": dist.get_rank() == 0}} if kind == 1 else {}))
        said.append(message(lambda model=model, policy=policy: funicular.offload(model, policy)))
        said.append(str(type(next(model.parameters())) is nn.Parameter))
    return said


def late(world: World) -> list[str]:
    """Rank 1 offloads when rank 0 has said that it waits for it."""
    told, said = Path(os.environ["RANKS_FOLDER"]) / "told", []

    class Tells(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())
            told.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funicular.ranks.group._SILENCE", 0.05)
        if dist.get_rank():
            while not told.exists():
                time.sleep(0.01)
        else:
            logging.getLogger("funicular").addHandler(Tells(logging.WARNING))
        model, opt = offloaded(world)
    model(own_batch(0)).sum().backward()
    opt.step()
    return said


def other_weights(world: World) -> list[Any]:
    """Other initial weights on rank 1, whose own are dropped with a warning."""
    torch.manual_seed(dist.get_rank())
    model = wide()
    own = model.out.weight.detach().clone()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("funicular").addHandler(handler)
    funicular.offload(model, world.policy(model))
    return [own, model.out.weight.detach().clone(), [line for line in lines if "FN-W720" in line]]


def edits(world: World) -> list[str]:
    """Edits of weights and gradients, each of which is refused and changes nothing; training goes on."""
    model, opt = offloaded(world)
    p = model.layers[0].up.weight
    model(own_batch(0)).sum().backward()
    before = [t.detach().clone() for t in (p, p.grad)]

    def weight(call: Any) -> Any:
        def edit() -> None:
            with torch.no_grad():
                call()

        return edit

    calls = {
        "mul_": weight(lambda: p.mul_(0.5)),
        "add_": weight(lambda: p.add_(1)),
        "out=": weight(lambda: torch.mul(p, 2, out=p)),
        "[]=": weight(lambda: p.__setitem__(0, 1.0)),
        "data=": lambda: setattr(p, "data", torch.zeros_like(p)),
        "load_state_dict": lambda: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}),
        "SGD": torch.optim.SGD([p], lr=0.1).step,
        "foreach": weight(lambda: torch._foreach_mul_([p], 2.0)),
        "grad.mul_": lambda: p.grad.mul_(0.5),
        "grad[0]": lambda: p.grad[0].zero_(),
        "grad.add_": lambda: p.grad.add_(1),
        "clip_value": lambda: nn.utils.clip_grad_value_(model.parameters(), 1e-9),
    }
    said = [f"{name}: {message(call)}" for name, call in calls.items()]
    said.append(str(all(torch.equal(a, b) for a, b in zip(before, (p, p.grad), strict=True))))
    opt.step()
    opt.zero_grad()
    model(own_batch(1)).sum().backward()
    return [*said, message(opt.step)]


def replaced_gradient(world: World) -> list[str]:
    """A gradient that rank 0 has put another tensor for, and one that it has changed past the guard."""
    model, opt = offloaded(world)
    said = []
    for step in range(2):
        model(own_batch(step)).sum().backward()
        if dist.get_rank() == 0:
            if step:
                torch.from_dlpack(model.out.weight.grad)[0] = 7
            else:
                model.out.weight.grad = torch.ones_like(model.out.weight)
        said.append(message(opt.step))
        opt.zero_grad()
    return said


class Editing(nn.Module):
    """A block that edits its weight in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(3))
        self.on = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def edit_inside(world: World) -> list[str]:
    """A forward that edits a weight."""
    model = Editing()

    def halve(module: Any, args: Any) -> None:
        with torch.no_grad():
            module.weight.mul_(0.5)

    torch.manual_seed(SEED)
    funicular.offload(model, world.policy(model))
    before = model.layers[1].weight.detach().clone()
    handle = model.layers[1].register_forward_pre_hook(halve)
    said = [message(lambda: model(own_batch(0)))]
    handle.remove()
    return [*said, str(torch.equal(before, model.layers[1].weight)), message(lambda: model(own_batch(0)))]


def fsdp() -> tuple[Any, Any]:
    """``FullyShardedDataParallel`` and ``fully_shard`` over all ranks, called with a module alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    near = torch.device("cuda", torch.cuda.current_device()) if DEVICE.type == "cuda" else DEVICE
    return functools.partial(FullyShardedDataParallel, device_id=near), functools.partial(fully_shard(), mesh=mesh)


def sharing(world: World) -> list[Any]:
    """What exchanges gradients or moves weights itself: around an offloaded model, in one that is to be, and as one; and a step after that."""
    from torch.distributed.device_mesh import init_device_mesh

    tensors: Any = importlib.import_module("torch.distributed.tensor")
    if not hasattr(tensors, "Replicate"):  # torch 2.4
        tensors = importlib.import_module("torch.distributed._tensor")
    wrapped, sharded = fsdp()
    ways = {
        "DistributedDataParallel": DistributedDataParallel,
        "DataParallel": nn.DataParallel,
        "FullyShardedDataParallel": wrapped,
        "FSDPModule": sharded,
    }
    model, opt = offloaded(world)
    said = {}
    for name, way in ways.items():
        taken, _ = offloaded(world)
        said[f"{name}, around"] = message(lambda way=way, taken=taken: way(taken)(own_batch(0)))
        inner = wide()
        inner.layers[1] = way(inner.layers[1])
        said[f"{name}, in it"] = message(lambda inner=inner: funicular.offload(inner, world.policy(wide())))
        outer = way(wide())
        said[f"{name}, itself"] = message(lambda outer=outer: funicular.offload(outer, world.policy(wide())))
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    spread = wide()
    spread.out.weight = nn.Parameter(tensors.distribute_tensor(spread.out.weight.detach(), mesh, [tensors.Replicate()]))
    said["DTensor, in it"] = message(lambda: funicular.offload(spread, world.policy(wide())))
    said["DataParallel, around"] = message(lambda: nn.DataParallel(model).replicate(model, [0]))
    return [said, message(lambda: train_one(model, opt, 0))]


def on_one_gpu(world: World) -> str:
    """All ranks on the same GPU, as where a program forgets to choose one."""
    model = wide()
    with mock.patch("funicular.ranks.meeting._gpu", return_value="GPU-7"):
        return message(lambda: funicular.offload(model, world.policy(model)))


def sharded_by_fsdp(world: World) -> list[Any]:
    """FSDP around an offloaded model, a block of it, blocks of it, and what holds it; a step after that; and FSDP once it is unwrapped."""
    wrapped, sharded = fsdp()
    model, opt = offloaded(world)
    places = {id(p): p.data_ptr() for p in model.parameters()}
    tries = {
        "FullyShardedDataParallel": lambda: wrapped(model),
        "FullyShardedDataParallel of a block": lambda: wrapped(model.layers[0]),
        "fully_shard": lambda: sharded(model),
        "fully_shard of a block": lambda: sharded(model.layers[0]),
        "fully_shard of blocks": lambda: sharded([model.layers[0], model.layers[1]]),
        "fully_shard of what holds it": lambda: sharded(nn.Sequential(model)),
    }
    later = hasattr(torch.distributed.fsdp, "fully_shard")
    if not later:
        del tries["fully_shard of blocks"]  # torch 2.4 takes one module
    said = {name: message(way) for name, way in tries.items()}
    same = {id(p): p.data_ptr() for p in model.parameters()} == places and "_fsdp" not in repr(vars(model))
    after = message(lambda: train_one(model, opt, 0))
    sharded(funicular.unwrap(model).to(DEVICE))
    if later or DEVICE.type == "cuda":  # that of torch 2.4 runs on GPUs alone
        model(own_batch(1)).sum().backward()
    return [said, same, after, type(model).__name__]


def alone_each(world: World) -> list[Any]:
    """``group="single"``: each rank trains a model of its own, also inside DDP."""
    torch.manual_seed(SEED)
    model = wide()
    funicular.offload(model, world.policy(model), group="single")
    model(own_batch(0)).sum().backward()
    own = model.out.weight.grad.clone()
    model.zero_grad()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("funicular").addHandler(handler)
    around = DistributedDataParallel(model)
    around(own_batch(0)).sum().backward()
    return [own, model.out.weight.grad.clone(), funicular.stats(model).ranks, said]


def save_and_go_on(folder: str, world: World, steps: int, wait: bool) -> list[torch.Tensor]:
    """Train, save on all ranks that call, and train on; the weights at the end."""
    model, opt = offloaded(world)
    for step in range(steps):
        train_one(model, opt, step)
    funicular.save(model, opt, folder, wait=wait)
    if dist.get_rank() == 0:
        funicular.save(model, opt, f"{folder}-alone")
    for step in range(steps, steps + 2):
        train_one(model, opt, step)
    return [p.detach().clone() for p in model.parameters()]


def save_each_step(folder: str, world: World, wait: bool) -> None:
    """Train and save after each step, the next of which begins as soon as it may."""
    model, opt = offloaded(world)
    for step in range(5):
        train_one(model, opt, step)
        funicular.save(model, opt, f"{folder}/step-{step}", wait=wait)
    funicular.save(model, opt, f"{folder}/end")  # waits for the one before


def train_one(model: nn.Module, opt: torch.optim.Optimizer, step: int) -> None:
    """One step on two batches, dealt to one or two ranks; a third rank has none."""
    size, rank = dist.get_world_size(), dist.get_rank()
    for batch in range(2):
        if size == 1 or batch % size == rank:
            (model(own_batch(step, batch)).square().mean() / (2 / size)).backward()
    opt.step()
    opt.zero_grad()


def resume(folder: str, world: World) -> list[list[torch.Tensor]]:
    """Load a checkpoint; weights and states."""
    model, opt = offloaded(world)
    train_one(model, opt, 99)  # it has states already, and other weights
    funicular.load(folder, model, opt)
    return values(model, opt)


def values(model: nn.Module, opt: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """Weights and states."""
    states = [[opt.state[p]["exp_avg"].clone(), opt.state[p]["exp_avg_sq"].clone()] for p in model.parameters()]
    return [[p.detach().clone() for p in model.parameters()], *states]


def on_meta(folder: str, world: World) -> list[torch.Tensor]:
    """Weights from a checkpoint, into a model on the meta device; and one step."""
    with torch.device("meta"):
        model = wide()
    funicular.offload(model, world.policy(model), checkpoint=folder)
    opt = funicular.AdamW(model.parameters(), lr=1e-2)
    train_one(model, opt, 5)
    return [p.detach().clone() for p in model.parameters()]


def unwrapped(world: World) -> list[Any]:
    """A model that is made an ordinary one again, on all ranks; and offloaded once more."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    funicular.unwrap(model)
    found = [p.detach().clone() for p in model.parameters()]
    assert all(type(p) is nn.Parameter for p in model.parameters())
    funicular.offload(model, world.policy(model))
    train_one(model, opt, 1)
    return found + [p.detach().clone() for p in model.parameters()]


def killed(world: World, where: str, victim: int) -> list[Any]:
    """One rank is killed at a point; what the others are told."""
    model, opt = offloaded(world)
    for step in range(2):
        train_one(model, opt, step)

    def die(here: str) -> None:
        if here == where and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "backward":
        model.layers[1].register_full_backward_hook(lambda *_: die("backward"))
    try:
        die("forward")
        loss = model(own_batch(3)).sum()
        loss.backward()
        die("step")
        opt.step()
        die("after")
        opt.zero_grad()
        for step in range(4, 6):
            train_one(model, opt, step)
    except funicular.Error as error:
        return [error.code, str(error)]
    return ["", ""]


def sharded(world: World) -> dict[str, Any]:
    """Facts of a rank."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    figures = funicular.stats(model)
    return {"ranks": figures.ranks, "text": str(figures), "flat": figures.to_dict()}


def one_raises(world: World) -> None:
    """Rank 1 fails between two steps."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    if dist.get_rank():
        raise ZeroDivisionError
    train_one(model, opt, 1)


def offloaded_alone(world: World) -> tuple[nn.Module, torch.optim.Optimizer]:
    """As :func:`offloaded`, in one process."""
    return offloaded(world)


def train_alone(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    """Two steps in one process."""
    for step in range(2):
        model(own_batch(step, 0)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def after_one_step(world: World) -> list[torch.Tensor]:
    """The weights after the step that :func:`on_meta` takes."""
    model, opt = offloaded(world)
    train_one(model, opt, 5)
    return [p.detach().clone() for p in model.parameters()]


def group_of_one(world: World) -> list[Any]:
    """The only rank of its group; and what is no group, where there is one."""
    model, opt = offloaded(world)
    train_one(model, opt, 0)
    other = wide()
    return [funicular.stats(model).ranks, message(lambda: funicular.offload(other, world.policy(other), group=[0]))[:7]]


def train_and_save(folder: str, world: World) -> list[str]:
    """Train until another rank is killed, with a save every second step; the code and text of the error."""
    try:
        model, opt = offloaded(world)
        (Path(os.environ["RANKS_FOLDER"]) / "begun").touch()
        for step in range(10**6):
            train_one(model, opt, step)
            if step % 2:
                funicular.save(model, opt, f"{folder}/step-{step}", wait=step % 4 == 1, keep=3)
    except funicular.Error as error:
        return [error.code, str(error)]
    return ["", ""]


def refused_policy(world: World, sections: dict[str, Any]) -> list[str]:
    """A policy that several ranks cannot have."""
    model = wide()
    said = message(lambda: funicular.offload(model, world.policy(model, **sections)))
    return [said, str(type(model.out.weight) is nn.Parameter)]
