"""Forks beside an offloaded model: they copy none of its memory, and a child that touches it is told so by name."""

import ctypes
import gc
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import in_child
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import children
import funicular
from funicular import testing
from models import CUDA, WIDTH, Stack
from twin import Run, World

pytestmark = [
    pytest.mark.io_engines,
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
REFUSED = 77
GIB = 1 << 30


def flags_at(address: int) -> list[str]:
    """Flags of the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if "-" in head[0] and not head[0].endswith(":"):
            start, end = (int(part, 16) for part in head[0].split("-"))
            inside = start <= address < end
        elif inside and head[0] == "VmFlags:":
            return head[1:]
    return []


def offloaded(world: World) -> Run:
    run = Run(world, True)
    run.model = run.wrap(Stack())
    run.opt = run.adamw()
    run.train(1, look=False)
    return run


def places(run: Run) -> dict[str, int]:
    """Addresses of each kind of the runtime's memory."""
    place = testing.inspect_parameter(run.model.layers[1].up.weight)
    assert place is not None
    found = {"home": place.home_address, "gradient": place.gradient_address}
    if run.world.device == "host":
        found["frame"] = place.frame_address
    return found


def test_no_memory_of_the_runtime_is_copied(world: World):
    run = offloaded(world)
    for name, address in places(run).items():
        assert "dc" in flags_at(address), name
    # Nor afterwards.
    assert in_child(lambda: 0) == 0
    for name, address in places(run).items():
        assert "dc" in flags_at(address), name
    run.train(1, look=False)


def test_in_the_child_the_addresses_stay_reserved(world: World):
    """Nothing else can come to lie where a tensor of the child still looks."""
    run = offloaded(world)
    wanted = places(run)

    def work() -> int:
        return 0 if all("rd" not in flags_at(address) and flags_at(address) for address in wanted.values()) else 3

    assert in_child(work) == 0


def use_parameter(run: Run) -> None:
    run.model.layers[1].up.weight.sum()


def use_model(run: Run) -> None:
    run.model(torch.ones(4, WIDTH))


def use_states(run: Run) -> None:
    run.opt.state[run.model.layers[1].up.weight]["exp_avg"].sum()


def take_step(run: Run) -> None:
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    run.opt.step()


def save_weights(run: Run) -> None:
    run.model.state_dict()["layers.1.up.weight"].sum()


def unwrap_model(run: Run) -> None:
    funicular.unwrap(run.model)


USES = [use_parameter, use_model, use_states, take_step, save_weights, unwrap_model]


@pytest.mark.covering(1)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_what_a_child_uses_is_refused_by_name(use, two_worlds: World):
    if two_worlds.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(two_worlds)
    assert in_child(lambda: use(run)) == REFUSED
    run.train(1, look=False)


def test_a_window_that_was_open_is_refused_too(two_worlds: World):
    """Inside a window a parameter is plain, for the threads of the parent."""
    if two_worlds.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(two_worlds)
    statuses = []

    def fork(module, *_):
        statuses.append(in_child(lambda: module.up.weight.sum() and None))
        statuses.append(in_child(lambda: module.up(torch.ones(4, WIDTH)) is None))

    handle = run.model.layers[1].register_forward_hook(fork)
    run.step(run.model(run.data(4, WIDTH)).square().mean())
    handle.remove()
    assert statuses == [REFUSED, REFUSED]
    run.train(1, look=False)


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", ["data", "detach", "numpy", "state_dict", "data_ptr"])
def test_views_that_were_taken_before_are_the_childs_own(how: str, two_worlds: World):
    """As in plain PyTorch: a child has the weights of the moment, and what it does with them stays in it."""
    if two_worlds.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(two_worlds)
    weight = run.model.layers[1].up.weight
    if how == "data_ptr":
        address = weight.data_ptr()
        view = np.ctypeslib.as_array((ctypes.c_float * weight.numel()).from_address(address))
    else:
        view = {
            "data": lambda: weight.data,
            "detach": weight.detach,
            "numpy": lambda: weight.detach().numpy(),
            "state_dict": lambda: run.model.state_dict()["layers.1.up.weight"],
        }[how]()
    expect = weight.detach().clone().flatten()

    def work() -> int:
        same = torch.equal(torch.as_tensor(view).flatten(), expect)
        view[...] = 0
        return 0 if same and float(abs(view).sum()) == 0 else 3

    assert in_child(work) == 0
    assert torch.equal(torch.as_tensor(view).flatten(), expect)
    assert torch.equal(weight.detach().flatten(), expect)
    run.train(1, look=False)


def test_gradients(host_world: World):
    """Refused like parameters, views of them too; what numpy was given is ordinary memory."""
    if host_world.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(host_world)
    run.model(run.data(4, WIDTH)).sum().backward()
    weight, other = run.model.layers[1].up.weight, run.model.layers[2].up.weight
    view, array = weight.grad.detach(), other.grad.numpy()
    expect = array.copy()
    assert in_child(lambda: weight.grad.sum() and None) == REFUSED
    assert in_child(lambda: view.sum() and None) == REFUSED
    assert in_child(lambda: 0 if np.array_equal(array, expect) else 3) == 0


def test_garbage_of_the_child(two_worlds: World):
    """A child that drops the model gives nothing of the parent's up, and ends."""
    run = offloaded(two_worlds)
    view = run.model.layers[1].up.weight.detach() if two_worlds.device == "host" else None

    def work() -> int:
        nonlocal view
        run.model = run.opt = view = None
        for _ in range(3):
            gc.collect()
        return 0

    assert in_child(work) == 0
    run.train(1, look=False)


def test_garbage_of_a_model_that_is_closed(two_worlds: World):
    """What keeps the memory alive in the end is a view, of which a child has a copy, and the last of which it may drop."""
    run = offloaded(two_worlds)
    kept = [p.detach() for p in run.model.parameters()]
    funicular.unwrap(run.model)
    run.model = run.opt = None
    gc.collect()

    expect = [t.clone() for t in kept]

    def work() -> int:
        same = all(map(torch.equal, kept, expect)) if two_worlds.device == "host" else True
        kept.clear()
        gc.collect()
        return 0 if same else 3

    assert in_child(work) == 0
    assert all(map(torch.equal, kept, expect))


def test_a_parameter_that_lost_its_model(two_worlds: World):
    """It is an ordinary one, for children too."""
    if two_worlds.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(two_worlds)
    weight = run.model.layers[1].up.weight
    expect = weight.detach().clone()
    run.model = run.opt = None
    gc.collect()
    assert type(weight) is nn.Parameter
    assert in_child(lambda: 0 if torch.equal(weight, expect) else 3) == 0
    assert torch.equal(weight, expect)


def test_a_child_that_offloads_is_refused_by_name(two_worlds: World):
    """Locks that threads of the parent held when it forked would never be let go in the child."""
    if two_worlds.device == "cuda":
        pytest.skip("CUDA does not survive fork")
    run = offloaded(two_worlds)

    def work() -> int:
        model = Stack(depth=2)
        with pytest.raises(funicular.RuntimeFailure, match=r"FN-E103.*'spawn'"):
            funicular.offload(model, two_worlds.policy(model))
        model(torch.ones(4, WIDTH)).sum().backward()
        return 0

    assert in_child(work, 60) == 0
    run.train(1, look=False)


def test_a_child_that_offloads_to_a_gpu_is_refused_by_name(host_world: World, monkeypatch: pytest.MonkeyPatch):
    """Before it asks CUDA which GPU is meant: CUDA does not start in a child."""
    run = offloaded(host_world)

    def work() -> int:
        def start() -> int:
            raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", start)
        with pytest.raises(funicular.RuntimeFailure, match=r"FN-E103.*'spawn'"):
            funicular.offload(Stack(depth=2), {"device": "cuda"})
        return 0

    assert in_child(work, 60) == 0
    run.train(1, look=False)


def _nothing() -> None:
    pass


def test_children_that_end_normally(two_worlds: World):
    """A process of ``multiprocessing`` runs exit handlers and collects garbage."""
    run = offloaded(two_worlds)
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_nothing)
        process.start()
        process.join(60)
        assert process.exitcode == 0
        run.train(1, look=False)


def test_data_loader_beside_a_model(two_worlds: World):
    run = offloaded(two_worlds)
    data = TensorDataset(torch.randn(16, WIDTH))
    for (x,) in DataLoader(data, 4, num_workers=4, persistent_workers=True):
        run.step(run.model(x.to(run.device)).square().mean())


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_an_address_that_nobody_was_told_of(tier: str, disk: str):
    """No exception can be raised there: the child ends, and says why."""
    if CUDA:
        pytest.skip("CUDA does not survive fork")
    body = """
    from funicular.testing import inspect_parameter
    import ctypes
    model = Stack()
    funicular.offload(model, world.policy(model))
    opt = funicular.AdamW(model.parameters())
    def step():
        model(torch.ones(4, WIDTH)).sum().backward(); opt.step(); opt.zero_grad()
    step()
    address = inspect_parameter(model.layers[2].up.weight).home_address
    pid = os.fork()
    if pid == 0:
        print(ctypes.c_float.from_address(address).value)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    step()
    """
    status, out, err = children.finish(children.start(body, disk, {"params": tier, "optimizer": "host"}))
    assert status == 0, err
    assert out == f"-{signal.SIGSEGV.value}\n"
    assert "FN-E103" in err
    if tier == "nvme":
        assert "'layers.2'" in err


def private(pid: int) -> int:
    """Bytes that only this process has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Private_"))


def homes(size: int) -> nn.Module:
    """A model whose homes, gradients and states are so large together."""
    layers = [
        nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(max(2, size // (14 * 2048 * 2048)))
    ]
    return nn.ModuleList(layers)


@pytest.mark.parametrize("size", [pytest.param(8 * GIB, marks=pytest.mark.gpu), GIB // 4], ids=["8GiB", "256MiB"])
def test_a_fork_is_cheap(size: int):
    """Page-locked memory is copied by a fork: 8 GiB take 5 s and 8 GiB."""
    model = homes(size)
    budget = {"host": f"{size * 2}B"} | ({} if CUDA else {"hbm": "64MiB"})
    tiers = {"params": {"tier": "host"}, "optimizer": {"tier": "host"}}
    funicular.offload(model, {"device": "cuda" if CUDA else "host", "budget": budget, **tiers})
    opt = funicular.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    model[0].weight.detach().sum()
    start = time.monotonic()
    pid = os.fork()
    took = time.monotonic() - start
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    try:
        # While the parent goes on.
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        model[0].weight.detach().sum()
        taken = private(pid)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    print(f"fork {took:.3f} s, {taken / 2**20:.0f} MiB in the child")
    assert taken < 200 << 20
    if size > GIB:
        assert took < 0.3
    funicular.unwrap(model)
