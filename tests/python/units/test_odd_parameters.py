"""Parameters that few models have: of a subclass, without elements, of no dimension, made under ``inference_mode``, distributed."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forks
import funicular
from conftest import DEVICE
from models import WIDTH
from several import fully_shard
from twin import Run, World


class Tagged(nn.Parameter):
    """A subclass that adds, and replaces nothing."""

    tag = "of the class"

    def doubled(self) -> Tensor:
        return self * 2


class Elsewhere(nn.Parameter):
    """A subclass that replaces something of a tensor, as those for packed weights do."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return super().to(*args, **kwargs)


class Product(nn.Module):
    """Uses what its parameter's class adds, inside forward."""

    def __init__(self, kind: type[nn.Parameter] = Tagged) -> None:
        super().__init__()
        self.weight = kind(torch.randn(WIDTH, WIDTH) / 8)
        self.weight.note = ["of the object"]  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tagged)
        return x + x @ self.weight.doubled() + self.bias


def products(kind: type[nn.Parameter] = Tagged) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Product(kind) for _ in range(4)])


def steps(run: Run, count: int = 3, width: int = WIDTH) -> list[float]:
    losses = []
    for seed in range(count):
        torch.manual_seed(seed)
        loss = run.model(torch.randn(5, width, device=run.device)).pow(2).mean()
        if loss.requires_grad:
            loss.backward()
        run.opt.step()
        run.opt.zero_grad()
        losses.append(loss.item())
    return losses


def pair(world: World, make: Callable[[], nn.Module]) -> Iterator[Run]:
    for offloaded in (False, True):
        run = Run(world, offloaded)
        run.model = run.wrap(make())
        run.opt = run.adamw()
        yield run


# ---------------------------------------------------------------------- subclasses


def test_a_plain_subclass_is_paged(two_worlds: World, tmp_path: Path):
    """It trains as it does in plain torch, and is of its class with its attributes all the time."""
    plain, paged = pair(two_worlds, products)
    assert steps(paged) == steps(plain)
    weight = paged.model[0].weight
    assert isinstance(weight, Tagged)
    assert (weight.tag, weight.note) == ("of the class", ["of the object"])
    assert torch.equal(weight.doubled(), plain.model[0].weight.doubled())
    assert funicular.stats(paged.model).unpaged == {}
    assert type(copy.deepcopy(paged.model)[0].weight) is Tagged
    assert pickle.loads(pickle.dumps(weight)).note == ["of the object"]
    funicular.save(paged.model, paged.opt, tmp_path / "c")
    funicular.load(tmp_path / "c", paged.model, paged.opt)
    funicular.unwrap(paged.model)
    assert type(weight) is Tagged
    assert weight.note == ["of the object"]
    assert steps(paged) == steps(plain)


def test_a_subclass_streams_into_a_model_on_the_meta_device(host_world: World, tmp_path: Path):
    model = products()
    funicular.save(model, None, tmp_path / "c")
    with torch.device("meta"):
        empty = products()
    funicular.offload(empty, host_world.policy(model), checkpoint=tmp_path / "c")
    assert isinstance(empty[1].weight, Tagged)
    assert empty[1].weight.note == ["of the object"]
    assert torch.equal(empty[1].weight.detach().cpu(), model[1].weight)


class Packed(nn.Module):
    """Frozen bytes of a subclass beside a trained parameter."""

    def __init__(self, kind: Any = Tagged) -> None:
        super().__init__()
        self.bytes = kind(torch.zeros(512, 512, dtype=torch.uint8), requires_grad=False)
        self.weight = nn.Parameter(torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


@pytest.mark.parametrize("kind", [Tagged, Elsewhere])
def test_what_is_not_paged_is_said_once_and_counted(kind: Any, host_world: World, caplog: Any):
    model = nn.Sequential(*[Packed(kind) for _ in range(4)])
    policy = host_world.policy(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)]))
    before = [m.bytes for m in model]
    funicular.offload(model, policy)
    told = [r.getMessage() for r in caplog.records if "FN-W112" in r.getMessage()]
    assert len(told) == 1
    for part in ("4 parameters of 1.0 MiB", f"{kind.__name__} on cpu", "'0.bytes'", "and 1 more"):
        assert part in told[0], told
    assert funicular.stats(model).unpaged == {"cpu": 4 << 18}
    assert "1.0 MiB of parameters on cpu" in str(funicular.stats(model))
    funicular.unwrap(model)
    assert all(m.bytes is b and type(b) is kind for m, b in zip(model, before, strict=True))


def test_plan_counts_what_is_there(tmp_path: Path):
    """Without padding, and with what is not paged."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class T(nn.Parameter): pass\n"
        "class L(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.q = T(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)\n"
        "        self.a = nn.Parameter(torch.zeros(4, 16))\n"
        "        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)\n"
        "def build(): return nn.Sequential(*[L() for _ in range(3)])\n"
        "def odd(): return nn.Sequential(*[nn.Linear(10, 10) for _ in range(5)])\n"
    )
    for function, params, trained, notes in (("build", 3 * (64 + 64 + 3), 3 * 64, 1), ("odd", 550, 550, 0)):
        planned = forks.plan([f"mine.py:{function}", "--gpu", "24GB", "--ram", "64GB", "--json"], cwd=tmp_path)
        out, err = planned.communicate()
        assert planned.returncode == 0, err
        plan = json.loads(out)
        assert (plan["params"], plan["trained"]) == (params, trained)
        assert sum("Not paged" in note and "T on meta" in note for note in plan["notes"]) == notes


# ---------------------------------------------------------------------- no elements, no dimensions, no parameters


class Rows(nn.Module):
    """A block with so many rows; with none its parameter has no elements."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + (x @ self.weight.t()).sum(-1, keepdim=True) / 100


class Scalar(nn.Module):
    def __init__(self, trained: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5), requires_grad=trained)
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "one unit without elements": lambda: nn.Sequential(Rows(3), Rows(0), Rows(5)),
    "a frozen one": lambda: nn.Sequential(Rows(3), frozen(Rows(0)), Rows(5)),
    "all without elements": lambda: nn.Sequential(Rows(0), Rows(0)),
    "only frozen ones": lambda: frozen(nn.Sequential(Rows(3), Rows(4))),
    "no dimensions": lambda: nn.Sequential(Scalar(), Scalar(False), Scalar()),
    "no parameters": lambda: nn.Sequential(Nothing(), Nothing()),
}


def everything(opt: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    """States of the optimizer and of the model, as nested lists."""
    states = opt.state_dict()["state"]
    names = ("step", "exp_avg", "exp_avg_sq")
    return [[states[i][name].tolist() for name in names] for i in sorted(states)] + [
        (name, value.tolist()) for name, value in model.state_dict().items()
    ]


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", SMALL)
def test_small(kind: str, two_worlds: World, tmp_path: Path):
    """Steps, states, checkpoints, statistics and the way back are those of plain torch."""
    torch.manual_seed(0)
    models = SMALL[kind](), None
    runs = []
    for offloaded in (False, True):
        run = Run(two_worlds, offloaded)
        run.model = copy.deepcopy(models[0]).to(run.device)
        if offloaded:
            funicular.offload(run.model, two_worlds.policy(nn.Sequential(Rows(8), Rows(8))))
        run.opt = funicular.AdamW([*run.model.parameters(), nn.Parameter(torch.ones(1))], lr=1e-2)
        runs.append(run)
    plain, paged = runs
    assert steps(paged) == steps(plain)
    assert everything(paged.opt, paged.model) == everything(plain.opt, plain.model)
    assert funicular.stats(paged.model).steps in (0, 3)
    opts = [r.opt if list(r.model.parameters()) else None for r in runs]
    for run in runs:
        run.opt.param_groups[0]["params"].pop()
    if not list(plain.model.parameters()):
        opts = [None, None]
    funicular.save(paged.model, opts[1], tmp_path / "c")
    funicular.load(tmp_path / "c", plain.model, opts[0])
    funicular.load(tmp_path / "c", paged.model, opts[1])
    assert steps(paged) == steps(plain)
    assert everything(paged.opt, paged.model) == everything(plain.opt, plain.model)
    funicular.unwrap(paged.model)
    assert steps(paged) == steps(plain)
    assert everything(paged.opt, paged.model) == everything(plain.opt, plain.model)


# ---------------------------------------------------------------------- inference mode


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])


@pytest.mark.parametrize("part", [slice(None), slice(2, 3)])
def test_made_under_inference_mode(part: slice, host_world: World):
    """Refused by name, all or part of it, and the model is as it was; a copy of it is an ordinary model."""
    model = net()
    with torch.inference_mode():
        for at in range(4)[part]:
            model[at] = copy.deepcopy(model[at])
        before = model(torch.ones(2, WIDTH))
    prints = [(id(p), type(p), p.data_ptr(), p.is_inference()) for p in model.parameters()]
    with pytest.raises(funicular.UsageError, match=f"FN-E112.*'{range(4)[part][0]}.weight'.*inference_mode"):
        funicular.offload(model, host_world.policy(net()))
    assert [(id(p), type(p), p.data_ptr(), p.is_inference()) for p in model.parameters()] == prints
    with torch.inference_mode():
        assert torch.equal(model(torch.ones(2, WIDTH)), before)
    plain, paged = pair(host_world, lambda: copy.deepcopy(model))
    assert steps(paged) == steps(plain)


def test_called_under_inference_mode(two_worlds: World, tmp_path: Path):
    """The functions themselves, on an ordinary model: what they make can be trained."""
    plain, paged = Run(two_worlds, False), Run(two_worlds, True)
    plain.model = net().to(plain.device)
    plain.opt = plain.adamw()
    with torch.inference_mode():
        funicular.save(plain.model, None, tmp_path / "w")
        with torch.inference_mode(mode=False), torch.device("meta"):
            empty = net()
        paged.model = funicular.offload(empty, two_worlds.policy(net()), checkpoint=tmp_path / "w")
    paged.opt = paged.adamw()
    assert steps(paged) == steps(plain)
    with torch.inference_mode():
        funicular.save(paged.model, paged.opt, tmp_path / "c")
        funicular.load(tmp_path / "c", paged.model, paged.opt)
        funicular.unwrap(paged.model)
    assert steps(paged) == steps(plain)


def test_a_parameter_that_is_computed(host_world: World):
    model = net()
    weight = model[1].weight
    del model[1].weight
    model[1]._parameters["weight"] = weight * 1
    with pytest.raises(funicular.UsageError, match=r"FN-E112.*'1\.weight' is computed"):
        funicular.offload(model, host_world.policy(net()))


# ---------------------------------------------------------------------- distributed


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """One process alone."""
    distributed = pytest.importorskip("torch.distributed.device_mesh")
    if DEVICE == "cuda":
        pytest.skip("the other libraries are tried on the CPU")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def by_fully_shard(model: nn.Module, mesh: Any) -> None:
    fully_shard()(model, mesh=mesh)


def by_parallelize_module(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


WAYS = [by_fully_shard, by_parallelize_module]


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # of torch 2.4, on a processor
@pytest.mark.parametrize("way", WAYS)
def test_distributed_before_offload(way: Any, mesh: Any, host_world: World):
    model = net()
    way(model, mesh)
    before = list(model.parameters())
    with pytest.raises(funicular.UsageError, match=r"FN-E112.*'0\.weight' is a DTensor"):
        funicular.offload(model, host_world.policy(net()))
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(funicular.UsageError, match=r"FN-E112.*DTensor"):
        funicular.AdamW(model.parameters())
    opt = funicular.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(funicular.UsageError, match=r"FN-E112.*DTensor"):
        opt.add_param_group({"params": list(model.parameters())})
    assert len(opt.param_groups) == 1


@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # of torch 2.4, on a processor
@pytest.mark.parametrize("use", ["forward", "step", "save", "load"])
def test_distributed_after_offload(use: str, mesh: Any, host_world: World, tmp_path: Path):
    """Named at the next use, whichever it is; FSDP is refused at once."""
    run = Run(host_world, True)
    run.model = run.wrap(net())
    run.opt = run.adamw()
    steps(run, 1)
    funicular.save(run.model, None, tmp_path / "c")
    run.model(torch.ones(2, WIDTH)).sum().backward()
    with pytest.raises(funicular.UsageError, match=r"FN-E140 fully_shard \(FSDP\)"):
        by_fully_shard(run.model, mesh)
    by_parallelize_module(run.model, mesh)
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: run.model(torch.ones(2, WIDTH)),
        "step": run.opt.step,
        "save": lambda: funicular.save(run.model, None, tmp_path / "d"),
        "load": lambda: funicular.load(tmp_path / "c", run.model),
    }
    with pytest.raises(funicular.UsageError, match=r"FN-E115.*'0\.weight'.*DTensor"):
        calls[use]()
    assert not (tmp_path / "d").exists()
    funicular.unwrap(run.model)
