"""docs/limits.md is true: every line names a test that exists, and those that have no other place are here."""

import ctypes
import re

import numpy as np
import pytest
import torch
from torch import nn

import children
import funicular
from conftest import DEVICE
from models import WIDTH, Block, Stack, stack
from twin import Mismatch, Run, compare, loud

LIMITS = (children.HERE.parents[1] / "docs" / "limits.md").read_text()
FILES = {file.name: file for file in children.HERE.rglob("test_*.py")}


def lines() -> list[str]:
    """Rows of tables, and items of lists with what is indented below them."""
    rows = [line for line in LIMITS.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    return rows + re.findall(r"^- .*(?:\n  .*)*", LIMITS, flags=re.MULTILINE)


@pytest.mark.parametrize("line", lines(), ids=lambda line: re.sub(r"\W+", " ", line)[:40].strip())
def test_line_names_its_test(line: str):
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", line)
    assert named, "the line names no test"
    for file, name in named:
        assert re.search(rf"^def {name}\(", FILES[file].read_text(), flags=re.MULTILINE), f"no {name} in {file}"


def test_there_are_lines():
    assert len(lines()) > 25


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_block(host_world):
    model = Stack()
    model.layers[2] = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    with pytest.raises(funicular.UsageError, match="FN-E123"):
        funicular.offload(model, host_world.policy(Stack()))
    assert all(type(p) is nn.Parameter for p in model.layers[0].parameters())


class UsesFunc(Block):
    def forward(self, x):
        slope = torch.func.grad(lambda w: (w**2).sum())(self.up.weight)
        return super().forward(x) + slope.sum() * 0


def test_torch_func_inside_a_block(host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack(UsesFunc))
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        run.model(run.data(4, WIDTH))
    with torch.no_grad():
        plain = Stack(Block).to(run.device)
        plain(run.data(4, WIDTH))


@pytest.mark.parametrize("how", ["subclass", "data"])
def test_gradient_kept_behind_the_guard(how: str, host_world):
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    run.model(run.data(4, WIDTH)).sum().backward()
    grad = run.model.layers[2].up.weight.grad
    if how == "subclass":
        kept = torch.Tensor._make_subclass(torch.Tensor, grad)
    else:
        kept = torch.empty_like(grad)
        kept.data = grad
    values = kept.clone()
    del grad
    run.model.zero_grad()
    with pytest.raises(funicular.Error, match="FN-E119"):
        run.model(run.data(4, WIDTH)).sum().backward()
    assert torch.equal(kept, values)
    del kept
    run.model.zero_grad()
    run.model(run.data(4, WIDTH)).sum().backward()


def test_view_kept_in_an_attribute(two_worlds):
    """Slower: other units are used from their homes. Right: every bit, and the view follows."""

    class Keeps(Block):
        def forward(self, x):
            self.__dict__["kept"] = self.up.weight.detach()
            return super().forward(x)

    def script(run: Run) -> None:
        for _ in range(3):
            run.train(1, look=False)
            run.record("kept", [layer.__dict__["kept"] for layer in run.model.layers])
        if run.offloaded:
            assert funicular.stats(run.model).home_uses > 0

    compare(two_worlds, stack(Keeps), script)


UNCOUNTED = {
    "row": lambda w: w[0].data.zero_(),
    "view": lambda w: w.view(-1).data.mul_(0.5),
    "numpy": lambda w: w.t().detach().numpy().fill(0.01),
    "fused": lambda w: torch._fused_sgd_(
        [w],
        [torch.ones_like(w)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=0.01,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    ),
}


@pytest.mark.parametrize("how", UNCOUNTED)
def test_uncounted_edit_of_a_view_inside_forward(how: str, host_world):
    """Lost, and the difference shows; with poison an error with the weight's name."""
    if host_world.device == "cuda" and how == "numpy":
        pytest.skip("numpy sees only the CPU")

    class Edits(Block):
        def forward(self, x):
            with torch.no_grad():
                UNCOUNTED[how](self.up.weight)
            return super().forward(x)

    def script(run: Run) -> None:
        run.train(2)

    assert loud(host_world, stack(Edits), script) == "refused"
    with pytest.raises(Mismatch):
        compare(host_world, stack(Edits), script, debug={"poison": False})

    run = Run(host_world, True)
    run.model = run.wrap(Stack(Edits))
    with pytest.raises(funicular.UsageError, match=r"FN-E118 'layers\.0\.up\.weight'"):
        run.model(run.data(4, WIDTH))


def floats_at(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def test_address_taken_inside_forward(host_world):
    if host_world.device == "cuda":
        pytest.skip("the CPU cannot read there")
    run = Run(host_world, True)
    run.model = run.wrap(Stack())
    weight, addresses, seen = run.model.layers[1].up.weight, [], []
    home = weight.data_ptr()

    def look(*_):
        values = weight.detach().flatten().numpy()
        assert np.array_equal(floats_at(home, weight.numel()), values)
        seen.append(np.array_equal(floats_at(addresses[0], weight.numel()), values))

    hooks = [run.model.layers[1].register_forward_pre_hook(lambda *_: addresses.append(weight.data_ptr()))]
    hooks += [layer.register_forward_pre_hook(look) for layer in run.model.layers[1:]]
    with torch.no_grad():
        run.model(run.data(4, WIDTH))
    for hook in hooks:
        hook.remove()
    assert seen[0]
    assert not all(seen)


@pytest.mark.parametrize("whose", ["view", "parameter"])
def test_address_of_a_view_that_is_gone(whose: str, host_world):
    if host_world.device == "cuda":
        pytest.skip("numpy sees only the CPU")

    def script(run: Run) -> None:
        run.train(1)
        weight = run.model.layers[2].up.weight
        address = (weight.detach() if whose == "view" else weight).data_ptr()
        with torch.no_grad():
            run.model(run.data(4, WIDTH))  # its bytes are in the frames now
        floats_at(address, weight.numel())[:] = 0.01
        with torch.no_grad():
            run.record("out", run.model(run.data(4, WIDTH)))

    if whose == "parameter":
        compare(host_world, stack(depth=3), script, frames=40, debug={"poison": False})
    else:
        with pytest.raises(Mismatch):
            compare(host_world, stack(depth=3), script, frames=40, debug={"poison": False})


PAST = {
    "jit": "assert torch.equal(torch.jit.script(torch.nn.functional.relu)(weight), values.relu())",
    "tensor": "assert torch.equal(torch.tensor(weight), values)",
    "func": "assert torch.equal(torch.func.grad(lambda w: (w ** 2).sum())(weight), values * 2)",
    "data": "q = torch.nn.Parameter(torch.zeros_like(values)); q.data = weight; assert torch.equal(q.detach(), values)",
}
CODE = """
import sys, warnings
sys.path[:0] = [{path!r}]
warnings.simplefilter("ignore")
import torch, funicular
from models import WIDTH, Stack
from twin import World
model = Stack()
world = World({device!r}, ({disk!r},), "nvme", "nvme")
funicular.offload(model, world.policy(model))
weight = model.layers[2].up.weight
values = weight.detach().clone()
with torch.no_grad():
    model(torch.ones(4, WIDTH))  # gives back the memory of that read
print("began", flush=True)
{act}
print("went on", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", PAST)
def test_past_the_dispatcher(how: str, disk: str):
    """On NVMe the bytes are brought as they are touched; after ``detach()`` it is the same."""
    if DEVICE == "cuda":
        pytest.skip("a fault of the device instead")
    for act in (PAST[how], PAST[how].replace("weight", "weight.detach()")):
        code = CODE.format(path=str(children.HERE), device=DEVICE, disk=disk, act=act)
        status, out, err = children.finish(children.program(code, DEVICE))
        assert status == 0, err
        assert out == "began\nwent on\n"


def test_plain_parameters_are_left_alone():
    """Following other optimizers' steps changes nothing about ordinary parameters."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    version = p._version
    torch.optim.SGD([p], lr=0.1, fused=True).step()
    assert p._version == version
    assert torch.equal(p.detach(), torch.full((3,), 0.9))
