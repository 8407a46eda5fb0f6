"""Checkpoints: what is saved and loaded is the training, bit for bit, wherever its bytes live."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS, make_world
from models import WIDTH, Block, Decoder, Stack
from twin import Mismatch, Run, World, match

pytestmark = pytest.mark.io_engines

#: parameters on the host and states on disk, besides the usual ones
WORLDS = {**PLACEMENTS, "mixed": {"params": "host", "optimizer": "nvme", "engine": "threads"}}
#: updates in spare frames ahead of the step, and units that live on the compute device: all, or some
AUTO = {"params": {"tier": "auto"}, "optimizer": {"tier": "auto", "spare": "0B"}}
SECTIONS: dict[str, dict[str, Any]] = {
    "spare": {"optimizer": {"tier": "host", "spare": "16MiB"}},
    "all resident": {**AUTO, "budget": {"hbm": "256MiB" if DEVICE == "cuda" else "64MiB"}},
    "some resident": {**AUTO, "budget": {"hbm": "64MiB" if DEVICE == "cuda" else "20MiB"}},
}
PLACES = [*WORLDS, *SECTIONS]
SOME_ON_DISK = {"override": [{"match": "layers.[024]*", "params": "nvme", "optimizer": "host"}]}


def world_of(name: str, disk: str, io_uring: bool) -> World:
    if name in PLACEMENTS:
        return make_world(name, disk, io_uring)
    return World(DEVICE, (disk,), **WORLDS.get(name, {}))


def build(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Dropout is on and the head is tied."""
    return Decoder(depth=5, dtype=dtype, tie=True)


def begin(world: World, make: Callable[[], nn.Module] = build, offloaded: bool = True, **sections: Any) -> Run:
    run = Run(world, offloaded)
    run.model = run.wrap(make(), **sections)
    run.opt = run.adamw()
    return run


def go_on(run: Run, steps: int = 3) -> list[tuple[str, Any]]:
    """Train on data that do not depend on what was before; everything seen."""
    run.notes.clear()
    run.generator = torch.Generator().manual_seed(99)
    run.train(steps)
    run.record_weights()
    for name, p in run.model.named_parameters():
        run.record(f"{name} states", dict(run.opt.state[p]))
    return list(run.notes)


def tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint's files of tensors."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_files(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    match(sorted(one.items()), sorted(other.items()))


@pytest.mark.covering(1, times=2)
@pytest.mark.parametrize("source", WORLDS)
@pytest.mark.parametrize("to", WORLDS)
def test_resume(source: str, to: str, disk: str, io_uring: bool, tmp_path: Path):
    """Another policy, another engine: losses, weights and states go on as if nothing had been."""
    resume(source, to, disk, io_uring, tmp_path)


@pytest.mark.parametrize(
    ("source", "to"), [("mixed", place) for place in SECTIONS] + [(place, "mixed") for place in SECTIONS]
)
def test_resume_elsewhere(source: str, to: str, disk: str, io_uring: bool, tmp_path: Path):
    resume(source, to, disk, io_uring, tmp_path)


def resume(source: str, to: str, disk: str, io_uring: bool, tmp_path: Path) -> None:
    first = begin(world_of(source, disk, io_uring), **SECTIONS.get(source, {}))
    first.train(3, look=False)
    funicular.save(first.model, first.opt, tmp_path / "c", extra={"epoch": 1})
    expected = go_on(first)
    torch.manual_seed(7)
    second = begin(world_of(to, disk, io_uring), **SECTIONS.get(to, {}))
    assert funicular.load(tmp_path / "c", second.model, second.opt) == (3, {"epoch": 1})
    match(expected, go_on(second))


@pytest.mark.covering(2)
@pytest.mark.parametrize("weights", ["param", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype: torch.dtype, weights: str, two_worlds: World, tmp_path: Path):
    """Weights as they are or as fp32 masters: both go on exactly."""
    first = begin(two_worlds, lambda: build(dtype))
    first.train(3, look=False)
    funicular.save(first.model, first.opt, tmp_path / "c", weights=weights)
    kinds = {t.dtype for name, t in tensors(tmp_path / "c").items() if "exp_avg" not in name and "master" not in name}
    assert kinds == {torch.float32 if weights == "fp32" else dtype}
    expected = go_on(first)
    second = begin(two_worlds, lambda: build(dtype))
    funicular.load(tmp_path / "c", second.model, second.opt)
    match(expected, go_on(second))


def test_some_units_on_disk(disk: str, tmp_path: Path):
    """Units of one model in different tiers, with the pieces of the save out of order on the disk."""
    world = World(DEVICE, (disk,), "host", "nvme")
    first = begin(world, **SOME_ON_DISK)
    first.train(3, look=False)
    funicular.save(first.model, first.opt, tmp_path / "c")
    expected = go_on(first)
    second = begin(world, **SOME_ON_DISK)
    funicular.load(tmp_path / "c", second.model, second.opt)
    match(expected, go_on(second))


RESUME = """
    from test_checkpoint import begin, go_on
    run = begin(world)
    assert funicular.load({path!r}, run.model, run.opt).step == 10
    torch.save(go_on(run, 10), {path!r} + ".notes")
"""


@pytest.mark.parametrize("placement", ["host", "nvme-threads"])
def test_in_a_new_process(placement: str, disk: str, tmp_path: Path):
    """Train 20 steps; or 10, save, and 10 in a new process."""
    first = begin(World(DEVICE, (disk,), **PLACEMENTS[placement]))
    first.train(10, look=False)
    path = str(tmp_path / "c")
    funicular.save(first.model, first.opt, path)
    expected = go_on(first, 10)
    children.succeed(RESUME.format(path=path), disk, PLACEMENTS[placement], DEVICE)
    match(expected, torch.load(f"{path}.notes"))


@pytest.mark.parametrize("broken", ["master", "count", "random", "weights"])
def test_the_comparison_can_fail(broken: str, host_world: World, tmp_path: Path):
    """Each part of what is loaded matters."""
    first = begin(host_world)
    first.train(3, look=False)
    funicular.save(first.model, first.opt, tmp_path / "c")
    expected = go_on(first)
    second = begin(host_world)
    funicular.load(tmp_path / "c", second.model, second.opt, random=broken != "random")
    p = second.model.layers[0].up.weight
    if broken == "master":
        second.opt.state[p]["master"].zero_()
    elif broken == "count":
        second.opt.state[p]["step"] = 2
    elif broken == "weights":
        with torch.no_grad():
            p.view(-1)[0] += 0.5
    with pytest.raises(Mismatch):
        match(expected, go_on(second))


def test_plain_and_offloaded_write_the_same(two_worlds: World, tmp_path: Path):
    """A model that was never offloaded, stepped by this project's AdamW, gives the same files; each loads into the other."""
    plain = Run(two_worlds, False)
    plain.model = build().to(plain.device)
    plain.opt = funicular.AdamW(plain.model.parameters(), lr=1e-2, weight_decay=0.1)
    plain.train(3, look=False)
    paged = begin(two_worlds)
    paged.train(3, look=False)
    funicular.save(plain.model, plain.opt, tmp_path / "plain")
    funicular.save(paged.model, paged.opt, tmp_path / "paged")
    assert_same_files(tmp_path / "plain", tmp_path / "paged")
    expected = go_on(paged)
    again = begin(two_worlds)
    funicular.load(tmp_path / "plain", again.model, again.opt)
    match(expected, go_on(again))
    other = Run(two_worlds, False)
    other.model = build().to(other.device)
    other.opt = funicular.AdamW(other.model.parameters(), lr=1.0)
    funicular.load(tmp_path / "paged", other.model, other.opt)
    match(expected, go_on(other))


def test_edits_before_a_save(two_worlds: World, tmp_path: Path):
    """An edited weight starts a new master, an edited state counts: before a save and after it."""

    def edit(run: Run) -> None:
        run.train(2, look=False)
        layers = run.model.layers
        with torch.no_grad():
            layers[1].up.weight.mul_(0.5)
            run.opt.state[layers[2].up.weight]["exp_avg"].mul_(2)

    first = begin(two_worlds)
    edit(first)
    funicular.save(first.model, first.opt, tmp_path / "c")
    assert "layers.1.up.weight.master" not in tensors(tmp_path / "c")
    expected = go_on(first)
    second = begin(two_worlds)
    funicular.load(tmp_path / "c", second.model, second.opt)
    match(expected, go_on(second))


class Odd(nn.Module):
    """Other strides, a frozen part, integers, a buffer that counts, an unused weight, a scalar, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.width = WIDTH
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.layers[1].weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t() / WIDTH)
        self.layers[2].weight.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3, 5))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 4))
        self.table = nn.Parameter(torch.arange(7), requires_grad=False)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * self.scale
        return self.norm(x)


@pytest.mark.parametrize("weights", ["param", "fp32"])
def test_odd_tensors(weights: str, two_worlds: World, tmp_path: Path):
    first = begin(two_worlds, Odd)
    first.train(3, look=False)
    funicular.save(first.model, first.opt, tmp_path / "c", weights=weights)
    expected = go_on(first)
    second = begin(two_worlds, Odd)
    second.train(1, look=False)
    funicular.load(tmp_path / "c", second.model, second.opt)
    match(expected, go_on(second))
    strict = Odd().load_state_dict(load_file(tmp_path / "c" / "model.safetensors"))
    assert not strict.missing_keys
    assert not strict.unexpected_keys


def test_two_optimizers_of_one_unit(nvme_world: World, tmp_path: Path):
    """Loading one optimizer leaves the states of the other alone."""
    run = Run(nvme_world, True)
    run.model = run.wrap(Stack())
    names = dict(run.model.named_parameters())
    ups = [p for n, p in names.items() if "up" in n]
    rest = [p for n, p in names.items() if "up" not in n]
    run.opt = funicular.AdamW(ups, lr=1e-2)
    other = funicular.AdamW(rest, lr=1e-2)
    for _ in range(2):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        run.opt.step()
        other.step()
        run.opt.zero_grad()
        other.zero_grad()
    funicular.save(run.model, run.opt, tmp_path / "c")
    before = {n: run.opt.state[p]["exp_avg"].clone() for n, p in names.items() if "up" in n}
    kept = {n: other.state[p]["exp_avg"].clone() for n, p in names.items() if "up" not in n}
    run.train(1, look=False)
    funicular.load(tmp_path / "c", run.model, run.opt)
    for n, p in names.items():
        expected = before[n] if n in before else kept[n]
        found = (run.opt if n in before else other).state[p]["exp_avg"]
        assert torch.equal(found, expected), n


def test_into_another_optimizer(host_world: World, tmp_path: Path):
    """States of the optimizer that had them before stay as they were."""
    run = begin(host_world)
    run.train(2)
    funicular.save(run.model, run.opt, tmp_path / "c")
    run.train(1)
    kept = [run.opt.state[p] for p in run.model.parameters()]
    before = run.opt.state_dict()["state"].values()
    new = run.adamw()
    funicular.load(tmp_path / "c", run.model, new)
    for states, then, p in zip(kept, before, run.model.parameters(), strict=True):
        assert torch.equal(states["exp_avg"], then["exp_avg"])
        assert torch.equal(states["step"], then["step"])
        assert new.state[p]["step"] == 2


def test_random_states(host_world: World, tmp_path: Path):
    numpy = pytest.importorskip("numpy")
    run = begin(host_world)
    funicular.save(run.model, run.opt, tmp_path / "c")

    def draws() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), float(numpy.random.rand())

    expected = draws()
    assert draws() != expected
    funicular.load(tmp_path / "c", run.model, run.opt)
    assert draws() == expected
    between = torch.get_rng_state()
    funicular.load(tmp_path / "c", run.model, run.opt, random=False)
    assert torch.equal(torch.get_rng_state(), between)


def test_what_is_on_the_disk(nvme_world: World, tmp_path: Path):
    """Files with names of the usual layout, shards with an index, a manifest, and no pickle."""
    run = begin(nvme_world)
    run.train(2, look=False)
    path = tmp_path / "runs" / "one"
    funicular.save(
        run.model, run.opt, path, shard_bytes=40_000, extra=[1, 2.5, "x", None, True, (3, {"k": float("nan")})]
    )
    names = sorted(facts.files(str(path)))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.startswith("model-")}
    assert len(set(index["weight_map"].values())) > 1
    assert {n.rsplit(".", 1)[1] for n in names} == {"safetensors", "json"}
    manifest = json.loads((path / "funicular.json").read_text())
    training = manifest["training"]
    assert manifest["version"] == 1
    assert training["step"] == 2
    assert training["tied"] == {"head.weight": "embed.weight"}
    assert training["policy"]["optimizer"]["tier"] == "nvme"
    assert training["groups"][0]["options"]["lr"] == 1e-2
    assert "head.weight" not in tensors(path)
    weights = {n: t for n, t in tensors(path).items() if "exp_avg" not in n and not n.endswith(".master")}
    match(sorted((n, p.detach().cpu().clone()) for n, p in run.model.named_parameters()), sorted(weights.items()))
    assert facts.files(str(path.parent)) == ["one"]
    again = begin(nvme_world)
    assert str(funicular.load(path, again.model, again.opt).extra) == str(
        [1, 2.5, "x", None, True, (3, {"k": float("nan")})]
    )


def test_groups_and_schedulers(host_world: World, tmp_path: Path):
    """Options of groups come back; a scheduler's state is the user's ``extra``."""

    def start() -> tuple[Run, Any]:
        run = Run(host_world, True)
        run.model = run.wrap(build())
        params = list(run.model.parameters())
        run.opt = funicular.AdamW(
            [{"params": params[:3], "lr": 1e-3, "betas": (0.8, 0.9)}, {"params": params[3:]}], lr=1e-2
        )
        return run, torch.optim.lr_scheduler.StepLR(run.opt, 1, gamma=0.5)

    def steps(run: Run, schedule: Any) -> list[tuple[str, Any]]:
        run.notes.clear()
        run.generator = torch.Generator().manual_seed(99)
        for _ in range(2):
            run.train(1)
            schedule.step()
        run.record_weights()
        return list(run.notes)

    first, schedule = start()
    steps(first, schedule)
    funicular.save(first.model, first.opt, tmp_path / "c", extra=schedule.state_dict())
    expected = steps(first, schedule)
    second, again = start()
    again.load_state_dict(funicular.load(tmp_path / "c", second.model, second.opt).extra)
    assert second.opt.param_groups[0]["betas"] == (0.8, 0.9)
    match(expected, steps(second, again))


def test_keep(host_world: World, tmp_path: Path):
    """The newest of the series stay; what is not of the series stays too."""
    run = begin(host_world)
    (tmp_path / "step-notes").mkdir()
    funicular.save(run.model, run.opt, tmp_path / "best")
    for step in range(1, 12, 5):
        run.train(1, look=False)
        funicular.save(run.model, run.opt, tmp_path / f"step-{step}", keep=2)
    assert sorted(os.listdir(tmp_path)) == ["best", "step-11", "step-6", "step-notes"]


def test_overwrite(host_world: World, tmp_path: Path):
    """A checkpoint is replaced if that was asked for."""
    run = begin(host_world)
    funicular.save(run.model, run.opt, tmp_path / "c")
    run.train(2, look=False)
    with pytest.raises(funicular.UsageError, match="FN-E402"):
        funicular.save(run.model, run.opt, tmp_path / "c")
    funicular.save(run.model, run.opt, tmp_path / "c", overwrite=True)
    assert funicular.load(tmp_path / "c", run.model, run.opt).step == 2
    assert os.listdir(tmp_path) == ["c"]


def test_budgets_hold(disk: str, tmp_path: Path):
    """Neither a save nor a load takes more host memory than the policy allows, and both say so where that is too little."""
    world = World(DEVICE, (disk,), "nvme", "nvme")
    run = begin(world, lambda: Stack(), budget={"host": "6MiB"} if DEVICE == "host" else {})
    run.train(2, look=False)
    peak = facts.budget(run.model, "host")[0]
    funicular.save(run.model, run.opt, tmp_path / "c")
    funicular.load(tmp_path / "c", run.model, run.opt)
    after, limit = facts.budget(run.model, "host")
    assert peak < after <= limit


def test_room_for_a_checkpoint(disk: str, tmp_path: Path):
    """A model whose checkpoint would not fit is refused before it trains; tensors that are held later are an error of the save."""
    world = World(DEVICE, (disk,), "host", "nvme")

    def build() -> Stack:
        """With moments small enough to leave less room than a save's frames need."""
        return Stack(lambda: Block(128), width=128)

    with pytest.raises(funicular.BudgetError, match="FN-E202") as refused:
        begin(world, build, budget={"host": "64KiB"})
    enough = re.search(r"Raise budget\.host to (\S+)\.", str(refused.value))
    assert enough is not None
    run = begin(world, build, budget={"host": enough[1]})
    run.train(1, look=False)
    held: list[torch.Tensor] = []
    with pytest.raises(funicular.BudgetError, match="FN-E205"):
        held.extend(run.opt.state[p]["exp_avg"] for p in run.model.parameters())
    with pytest.raises(funicular.BudgetError, match=r"FN-E409.*budget\.host"):
        funicular.save(run.model, run.opt, tmp_path / "d")
    assert os.listdir(tmp_path) == []
    held.clear()
    run.train(1, look=False)
    funicular.save(run.model, run.opt, tmp_path / "d")


def test_between_backward_and_step(host_world: World, tmp_path: Path):
    """A save between a backward and a step changes nothing, and gradients are not part of it."""
    first, second = begin(host_world), begin(host_world)
    for run in (first, second):
        torch.manual_seed(2)
        run.train(1, look=False)
        run.generator = torch.Generator().manual_seed(3)
        torch.manual_seed(3)
        run.model(run.model.example(run)).backward()
    funicular.save(first.model, first.opt, tmp_path / "c")
    for run in (first, second):
        torch.manual_seed(4)
        run.opt.step()
        run.opt.zero_grad()
    torch.manual_seed(5)
    expected = go_on(second)
    torch.manual_seed(5)
    match(expected, go_on(first))


def step_with(run: Run, seed: int) -> None:
    """A step whose gradients are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    for p in run.model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype).to(run.device)
    run.opt.step()
    run.opt.zero_grad()


@pytest.mark.parametrize(
    ("source", "to"),
    [
        ("host", "host"),
        pytest.param("host", "cuda", marks=pytest.mark.gpu),
        pytest.param("cuda", "host", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("place", ["host", "mixed"])
def test_another_device(source: str, to: str, place: str, disk: str, tmp_path: Path):
    """AdamW has the same bits everywhere, so that training goes on exactly on another device."""
    first = begin(World(source, (disk,), **WORLDS[place]))
    for seed in range(3):
        step_with(first, seed)
    funicular.save(first.model, first.opt, tmp_path / "a")
    second = begin(World(to, (disk,), **WORLDS[place]))
    funicular.load(tmp_path / "a", second.model, second.opt)
    for run, name in ((first, "b"), (second, "c")):
        step_with(run, 3)
        funicular.save(run.model, run.opt, tmp_path / name)
    assert_same_files(tmp_path / "b", tmp_path / "c")
