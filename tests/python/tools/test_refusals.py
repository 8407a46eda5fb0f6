"""Bad input: each has its own error, which names the thing and what to do, before anything is touched."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import WIDTH, Stack
from twin import Run, World, compare, merge

FAMILIES = {
    "FN-E1": ValueError,
    "FN-E2": MemoryError,
    "FN-E5": ValueError,
    "FN-E603": ValueError,
    "FN-E604": ValueError,
}


def family(code: str) -> type[Exception]:
    return FAMILIES.get(code) or FAMILIES.get(code[:5]) or OSError


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that offloading changes, and what it computes."""
    prints: dict[str, Any] = {"attributes": sorted(model.__dict__), "class": type(model)}
    for name, m in model.named_modules():
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        prints[f"hooks of {name}"] = [len(h) for h in hooks]
    for name, p in model.named_parameters():
        hooks = (p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None))
        address = p.data_ptr() if plain(p) else None
        prints[name] = (type(p), id(p), p._version, address, p.dtype, p.grad, hooks, sorted(p.__dict__))
    return prints


def plain(p: torch.Tensor) -> bool:
    return not isinstance(p, nn.parameter.UninitializedTensorMixin) and not p.is_meta and p.layout == torch.strided


def computes(model: nn.Module) -> torch.Tensor | None:
    """The output, where the model has one."""
    if not all(plain(p) and p.dtype == torch.float32 for p in model.parameters()) or not isinstance(model, Stack):
        return None
    with torch.no_grad():
        return model(torch.ones(2, WIDTH))


def refuse(model: nn.Module, policy: Any, code: str, *says: str) -> funicular.Error:
    """Offload, see it refused, and that nothing was touched."""
    before, output, files = fingerprint(model), computes(model), facts.open_files()
    with pytest.raises(funicular.Error) as info:
        funicular.offload(model, policy)
    error = info.value
    assert error.code == code, error
    assert isinstance(error, family(code))
    assert str(error).startswith(code)
    for part in says:
        assert re.search(part, str(error)), f"no {part!r} in: {error}"
    assert fingerprint(model) == before
    assert facts.open_files() <= files
    assert facts.saved_tensor_hooks() == 0
    if output is not None:
        assert torch.equal(computes(model), output)
    with pytest.raises(funicular.UsageError, match="FN-E114"):
        funicular.stats(model)
    return error


# ------------------------------------------------------------------ policies


@dataclass(frozen=True)
class Bad:
    """A policy's wrong part, the code it gives, and what the message must contain."""

    code: str
    says: tuple[str, ...]
    sections: dict[str, Any] = field(default_factory=dict)


POLICIES = {
    "unknown key": Bad("FN-E502", ("budget.hmb", "did you mean 'hbm'"), {"budget": {"hmb": "1MiB"}}),
    "unknown section": Bad("FN-E502", ("'budgets'", "did you mean 'budget'"), {"budgets": {"hbm": "1MiB"}}),
    "unknown key, nothing near": Bad("FN-E502", ("optimizer.amsgrad", "Valid keys"), {"optimizer": {"amsgrad": True}}),
    "size without unit": Bad("FN-E503", ("budget.hbm", "unit", '"12GiB"'), {"budget": {"hbm": "12"}}),
    "size as a number": Bad("FN-E503", ("budget.host", "unit", '"4096GiB"'), {"budget": {"host": 4096}}),
    "unit unknown": Bad("FN-E503", ("budget.hbm", "parsec", "GiB"), {"budget": {"hbm": "4 parsec"}}),
    "negative size": Bad("FN-E503", ("budget.hbm", "-4GiB"), {"budget": {"hbm": "-4GiB"}}),
    "tier unknown": Bad("FN-E503", ("params.tier", "'nvmee'", "did you mean 'nvme'"), {"params": {"tier": "nvmee"}}),
    "engine unknown": Bad("FN-E503", ("nvme.engine", "'aio'", "io_uring, threads"), {"nvme": {"engine": "aio"}}),
    "block": Bad("FN-E503", ("nvme.block", "3KiB", "power of two"), {"nvme": {"block": "3KiB"}}),
    "queue depth": Bad("FN-E503", ("queue_depth", "1 to 4096"), {"nvme": {"queue_depth": 0}}),
    "wrong kind": Bad("FN-E503", ("debug.poison",), {"debug": {"poison": "yes"}}),
    "fault": Bad("FN-E503", ("debug.faults", "read:bang@1", "direction:kind"), {"debug": {"faults": "read:bang@1"}}),
    "no such unit": Bad("FN-E506", ("units.match", "nothing", "layers"), {"units": {"match": ["nothing.*"]}}),
    "nvme without paths": Bad("FN-E503", ("nvme.paths", "empty", "local disk"), {"nvme": {"paths": []}}),
    "missing path": Bad("FN-E604", ("/var/tmp/none/at/all", "Create"), {"nvme": {"paths": ["/var/tmp/none/at/all"]}}),
    "path is a file": Bad("FN-E604", ("/etc/passwd", "[Dd]irectory"), {"nvme": {"paths": ["/etc/passwd"]}}),
    "path below a file": Bad("FN-E604", ("/etc/passwd/x", "[Dd]irectory"), {"nvme": {"paths": ["/etc/passwd/x"]}}),
    "path not writable": Bad("FN-E604", ("/proc/self", "write"), {"nvme": {"paths": ["/proc/self"]}}),
    "tmpfs": Bad("FN-E603", ("/dev/shm", "memory", "local disk"), {"nvme": {"paths": ["/dev/shm"]}}),
    "no room": Bad("FN-E201", ("layers.0", "needs", "4.0 KiB", "Raise budget.hbm"), {"budget": {"hbm": "4KiB"}}),
    "host budget": Bad("FN-E202", ("needs", "64.0 KiB", "Raise budget.host"), {"budget": {"host": "64KiB"}}),
    "more than the machine": Bad("FN-E202", ("900.0 TiB", "available"), {"budget": {"host": "900TiB"}}),
    "nvme budget": Bad("FN-E203", ("needs", "8.0 KiB", "Raise budget.nvme"), {"budget": {"nvme": "8KiB"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_policy(name: str, nvme_world: World, disk: str):
    """Refused with nothing touched; with the mistake corrected the same model trains exactly."""
    bad = POLICIES[name]
    if DEVICE == "cuda" and name == "no room":
        pytest.skip("other sizes")
    if name == "tmpfs" and not os.path.ismount("/dev/shm"):
        pytest.skip("/dev/shm is no tmpfs here")

    def script(run: Run) -> None:
        run.model = Stack()
        policy = nvme_world.policy(run.model)
        if run.offloaded:
            refuse(run.model, merge(policy, bad.sections), bad.code, *bad.says)
            assert not facts.files(disk)
        run.wrap(run.model)
        run.opt = run.adamw()
        run.train(2)

    compare(nvme_world, None, script)


FILES = {
    "line and column": ('[budget]\nhost = "1GiB"\nhbm = 12\n', "FN-E503", ("bad.toml:3:7", "budget.hbm", '"12GiB"')),
    "not toml": ('[budget\nhbm = "1GiB"\n', "FN-E501", ("bad.toml:1:8",)),
    "key": ('[nvme]\npath = ["/mnt"]\n', "FN-E502", ("bad.toml:2:1", "nvme.path", "did you mean 'paths'")),
    "a key twice": ('[budget]\nhbm = "1GiB"\nhbm = "2GiB"\n', "FN-E501", ("bad.toml:3", "duplicate")),
    "another version": ("version = 2\n", "FN-E503", ("bad.toml:1:11", "version", "reads 1")),
}


@pytest.mark.parametrize("name", FILES)
def test_file(name: str, tmp_path: Path):
    text, code, says = FILES[name]
    path = tmp_path / "bad.toml"
    path.write_text(text)
    refuse(Stack(), path, code, *says)
    refuse(Stack(), str(path), code, *says)


def test_file_that_is_not_there(tmp_path: Path):
    error = refuse(Stack(), tmp_path / "none.toml", "FN-E504", "none.toml", "No such file")
    assert isinstance(error, ValueError)


def test_environment(monkeypatch: pytest.MonkeyPatch, host_world: World):
    """What comes from a variable is checked as strictly, and the variable is named."""
    model = Stack()
    monkeypatch.setenv("FUNICULAR_BUDGET__HBM", "12")
    refuse(model, host_world.policy(model), "FN-E503", "FUNICULAR_BUDGET__HBM", "unit")
    monkeypatch.delenv("FUNICULAR_BUDGET__HBM")
    monkeypatch.setenv("FUNICULAR_BUDGET__HMB", "1GiB")
    refuse(model, host_world.policy(model), "FN-E502", "FUNICULAR_BUDGET__HMB", "did you mean")
    monkeypatch.delenv("FUNICULAR_BUDGET__HMB")
    monkeypatch.setitem(os.environ, "FUNICULAR_NVME__PATHS", os.fsdecode(b"/mnt/\xff"))
    refuse(model, host_world.policy(model), "FN-E503", "FUNICULAR_NVME__PATHS", "UTF-8")


class Odd(nn.Module):
    """Units whose bytes are no round number of anything."""

    def __init__(self, width: int = 517) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 41)


BUDGETS = [
    ("hbm", "FN-E201", "host"),
    ("host", "FN-E202", "host"),
    ("host", "FN-E202", "nvme"),
    ("nvme", "FN-E203", "nvme"),
]


@pytest.mark.parametrize("build", [Stack, Odd])
@pytest.mark.parametrize(("key", "code", "tier"), BUDGETS)
def test_the_number_asked_for_is_enough(key: str, code: str, tier: str, build: Callable[[], nn.Module], disk: str):
    """The message says how much is needed; with exactly that, it works."""
    world = World(DEVICE, (disk,), tier, tier)
    model = build()
    error = refuse(
        model, world.policy(model, budget={key: "1KiB"}), code, "needs", f"Raise budget.{key}|name a directory"
    )
    number = re.search(r"needs ([\d.]+ ?[KMGT]?i?B)", str(error))
    assert number, error
    funicular.offload(model, world.policy(model, budget={key: number[1]}))
    peak, limit = facts.budget(model, key)
    assert limit is None or peak <= limit
    funicular.unwrap(model)


# ------------------------------------------------------------------ models


def with_parameter(make: Callable[[Stack], nn.Parameter]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Stack()
        model.layers[1].register_parameter("extra", make(model))
        return model

    return build


def double_block() -> nn.Module:
    model = Stack()
    model.layers[2].double()
    return model


def data_shared() -> nn.Module:
    model = Stack()
    model.layers[1].up.weight.data = model.layers[2].up.weight.data
    return model


def lazy() -> nn.Module:
    model = Stack()
    model.late = nn.LazyLinear(4)
    return model


def scripted() -> nn.Module:
    model = Stack()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript
        model.layers[1].extra = torch.jit.script(nn.Linear(4, 4))
    return model


def meta_block() -> nn.Module:
    model = Stack()
    model.layers[3].to("meta")
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "meta": (lambda: Stack().to("meta"), "FN-E111", ("inp.weight", "meta", "[Mm]aterialise")),
    "one block on meta": (meta_block, "FN-E111", ("layers.3.norm.weight", "meta")),
    "float64": (double_block, "FN-E112", ("layers.2.norm.weight", "float64", "float32, bfloat16 or float16")),
    "complex": (
        with_parameter(lambda m: nn.Parameter(torch.zeros(3, dtype=torch.complex64))),
        "FN-E112",
        ("layers.1.extra", "complex64", "freeze"),
    ),
    "sparse": (
        with_parameter(lambda m: nn.Parameter(torch.eye(4).to_sparse())),
        "FN-E112",
        ("layers.1.extra", "sparse", "dense"),
    ),
    "expanded": (
        with_parameter(lambda m: nn.Parameter(torch.zeros(1, 8).expand(8, 8))),
        "FN-E113",
        ("layers.1.extra", "expanded", "contiguous"),
    ),
    "overlapping itself": (
        with_parameter(lambda m: nn.Parameter(torch.zeros(10).as_strided((4, 4), (2, 1)))),
        "FN-E113",
        ("layers.1.extra", "overlaps", "contiguous"),
    ),
    "a slice with gaps": (
        with_parameter(lambda m: nn.Parameter(torch.zeros(8, 8)[:, ::2])),
        "FN-E113",
        ("layers.1.extra", "gaps", "contiguous"),
    ),
    "view of another": (
        with_parameter(lambda m: nn.Parameter(m.layers[2].up.weight.data[:4])),
        "FN-E113",
        ("layers.1.extra", "layers.2.up.weight", "clone"),
    ),
    "the same data twice": (data_shared, "FN-E113", ("layers.1.up.weight", "layers.2.up.weight", "Tie")),
    "scripted": (scripted, "FN-E123", ("layers.1.extra", "TorchScript", "made from")),
    "lazy": (lazy, "FN-E112", ("late.weight", "not initialised", "forward")),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, disk: str):
    build, code, says = MODELS[name]
    policy = World(DEVICE, (disk,), "nvme", "nvme").policy(Stack())
    refuse(build(), policy, code, *says)
    assert not facts.files(disk)


def test_frozen_float64_is_paged(two_worlds: World):
    """What is not trained may have any type."""

    def build() -> nn.Module:
        model = Stack()
        model.layers[2].register_parameter("table", nn.Parameter(torch.arange(8.0).double(), requires_grad=False))
        return model

    compare(two_worlds, build, lambda run: run.train(2))


def test_views_of_one_storage_that_do_not_overlap(two_worlds: World):
    """A fused buffer cut into parameters is right, and accepted."""

    def build() -> nn.Module:
        model = Stack()
        fused = torch.randn(2, WIDTH, WIDTH) / WIDTH
        model.layers[0].up.weight.data, model.layers[1].up.weight.data = fused[0], fused[1]
        return model

    compare(two_worlds, build, lambda run: run.train(2))


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable"])
def test_optimizer_option(option: str):
    with pytest.raises(funicular.UsageError, match=rf"FN-E117.*{option}.*False"):
        funicular.AdamW(Stack().parameters(), **{option: True})


def test_sparse_gradient(two_worlds: World):
    """Refused at ``step`` with nothing changed; dense gradients then train exactly."""

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(31, WIDTH, sparse=True)

        def example(self, run: Run) -> torch.Tensor:
            return run.tokens(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.embed(x))

    def script(run: Run) -> None:
        run.model(run.tokens(4)).square().mean().backward()
        assert run.model.embed.weight.grad.is_sparse
        if run.offloaded:
            before = copy.deepcopy(run.model.state_dict())
            with pytest.raises(funicular.UsageError, match=r"FN-E116.*sparse=False"):
                run.opt.step()
            after = run.model.state_dict()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert not run.opt.state_dict()["state"]
        run.opt.zero_grad()
        run.model.embed.sparse = False
        run.train(3)

    compare(two_worlds, Model, script)


def test_twice(host_world: World):
    """The second call says so and leaves the first as it was."""

    def script(run: Run) -> None:
        run.train(1)
        if run.offloaded:
            for part in (run.model, nn.Sequential(run.model), run.model.layers, run.model.layers[2]):
                with pytest.raises(funicular.UsageError, match="FN-E110"):
                    funicular.offload(part, host_world.policy(run.model))
        run.train(2)

    compare(host_world, Stack, script)


# ------------------------------------------------------------------ disks

FULL = """
mount -t ext4 -o loop {image} {disk}
"""
READ_ONLY = """
mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}
"""
TRY = """
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
before = [p.detach().clone() for p in model.parameters()]
policy = {"device": "host", "budget": {"hbm": "16MiB", "host": "64MiB"},
          "nvme": {"paths": [disk], "engine": "threads"}, "params": {"tier": "nvme"}, "optimizer": {"tier": "nvme"}}
try:
    funicular.offload(model, policy)
except funicular.Error as error:
    print(error.code, isinstance(error, OSError), isinstance(error, ValueError))
    print(str(error).replace("\\n", " "))
assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
print(model(torch.ones(1, 1024)).shape, sorted(set(os.listdir(disk)) - {"lost+found"}))
"""


def test_disk_full(disk: str, tmp_path: Path):
    """More is asked for than is free: the path, what is needed, what is there."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    code, message, after = children.behind(FULL.format(image=image, disk=disk), TRY, disk, PLACEMENTS["nvme-threads"])
    assert code == "FN-E605 True False"
    assert disk in message
    assert re.search(r"need[s]? .*MiB", message), message
    assert re.search(r"free", message), message
    assert after.endswith("[]")


def test_disk_read_only(disk: str):
    code, message, after = children.behind(READ_ONLY.format(disk=disk), TRY, disk, PLACEMENTS["nvme-threads"])
    assert code == "FN-E604 False True"
    assert disk in message
    assert "Read-only" in message
    assert after.endswith("[]")


def test_directory_of_somebody_else(disk: str):
    """Root may write anywhere, so the child becomes the user ``nobody`` first."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    body = "os.setgid(65534); os.setuid(65534)\n" + TRY
    Path(disk).chmod(0o755)
    code, message, after = children.succeed(body, disk, PLACEMENTS["nvme-threads"])
    assert code == "FN-E604 False True"
    assert disk in message
    assert "write" in message
    assert after.endswith("[]")
