"""Saves beside training: the state at the call, exactly, although the model changes meanwhile."""

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import PLACES, SECTIONS, Odd, assert_same_files, begin, build, go_on, world_of

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import WIDTH, Block, Stack, stack
from twin import Run, World, compare, match

pytestmark = pytest.mark.io_engines

#: so slow that the next steps come long before the end of a save
SLOW = {"faults": "write:delay=20ms@1x1000000"}
FOREVER = 10**9


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def any_world(place: str, disk: str, io_uring: bool) -> World:
    return world_of(place, disk, io_uring)


def slow(world: World, make: Callable[[], Any] = build, **sections: Any) -> Run:
    """A run whose writes all take their time; small shards make many of them."""
    return begin(world, make, debug=SLOW, **sections)


def saved_aside(run: Run, path: Path, **more: Any) -> funicular.SaveHandle:
    return funicular.save(run.model, run.opt, path, wait=False, shard_bytes=30_000, **more)


def test_equals_a_save_that_was_waited_for(place: str, any_world: World, tmp_path: Path):
    """Steps go on during the save; what is saved, and what is trained, are as without."""
    alone = begin(any_world, **SECTIONS.get(place, {}))
    alone.train(3, look=False)
    funicular.save(alone.model, alone.opt, tmp_path / "waited", shard_bytes=30_000)
    expected = go_on(alone, 4)
    run = slow(any_world, **SECTIONS.get(place, {}))
    run.train(3, look=False)
    handle = saved_aside(run, tmp_path / "aside")
    assert not handle.done()
    found = go_on(run, 4)
    handle.wait()
    match(expected, found)
    assert_same_files(tmp_path / "waited", tmp_path / "aside")


def test_the_update_before_belongs_to_it(place: str, any_world: World, tmp_path: Path):
    """Asked for right after a step whose updates are still under way."""
    for k in range(2):
        runs = []
        for wait in (True, False):
            run = begin(any_world, **SECTIONS.get(place, {}))
            run.train(2, look=False)
            run.model(run.model.example(run)).backward()
            run.opt.step()
            handle = funicular.save(run.model, run.opt, tmp_path / f"{k}-{wait}", wait=wait)
            run.opt.zero_grad()
            run.train(2, look=False)
            handle.wait()
            runs.append(run)
        assert_same_files(tmp_path / f"{k}-True", tmp_path / f"{k}-False")


def clamp_in_forward(run: Run) -> None:
    """An edit inside the window of a layer."""

    def hook(module: Any, args: Any) -> None:
        with torch.no_grad():
            module.weight.clamp_(-0.01, 0.01)

    handle = run.model.layers[-1].down.register_forward_pre_hook(hook)
    run.model(run.model.example(run))
    handle.remove()


def edit_weights(run: Run) -> None:
    with torch.no_grad():
        for p in reversed(list(run.model.parameters())):
            p.mul_(0.5)


def edit_data(run: Run) -> None:
    for p in reversed(list(run.model.parameters())):
        p.data.fill_(0.25)


def edit_states(run: Run) -> None:
    for p in reversed(list(run.model.parameters())):
        run.opt.state[p]["exp_avg"].zero_()
    run.train(1, look=False)


def load_weights(run: Run) -> None:
    run.model.load_state_dict({name: torch.ones_like(t) for name, t in run.model.state_dict().items()})


def load_states(run: Run) -> None:
    packed = run.opt.state_dict()
    for state in packed["state"].values():
        state["exp_avg_sq"].fill_(3)
    run.opt.load_state_dict(packed)


def another_optimizer(run: Run) -> None:
    sgd = torch.optim.SGD(run.model.parameters(), lr=1.0)
    run.model(run.model.example(run)).backward()
    sgd.step()


EDITS = [clamp_in_forward, edit_weights, edit_data, edit_states, load_weights, load_states, another_optimizer]


@pytest.mark.covering(1)
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
def test_edits_meanwhile(edit: Callable[[Run], None], two_worlds: World, tmp_path: Path):
    """A change of the model during a save waits until the save has read it."""
    run = slow(two_worlds)
    run.train(2, look=False)
    funicular.save(run.model, run.opt, tmp_path / "before")
    handle = saved_aside(run, tmp_path / "aside")
    edit(run)
    handle.wait()
    assert_same_files(tmp_path / "before", tmp_path / "aside")
    funicular.save(run.model, run.opt, tmp_path / "after")
    with pytest.raises(AssertionError):
        assert_same_files(tmp_path / "before", tmp_path / "after")


def test_aliases_and_buffers(host_world: World, tmp_path: Path):
    """Raw aliases are read before the call returns; buffers, which any forward may change, are copied."""
    run = slow(host_world, Odd)
    run.train(2, look=False)
    alias = run.model.layers[3].weight.data
    funicular.save(run.model, run.opt, tmp_path / "before")
    handle = saved_aside(run, tmp_path / "aside")
    alias.fill_(7)
    run.train(2, look=False)
    handle.wait()
    assert_same_files(tmp_path / "before", tmp_path / "aside")


@pytest.mark.parametrize("kind", [funicular.AdamW, torch.optim.AdamW])
def test_a_model_that_is_not_offloaded(kind: Any, host_world: World, tmp_path: Path):
    """The next step waits until its tensors were read; an edit that no hook announces is an error of the save."""
    run = Run(host_world, False)
    run.model = Stack().to(run.device)
    run.opt = kind(run.model.parameters(), lr=1e-2)
    run.train(2, look=False)
    funicular.save(run.model, run.opt, tmp_path / "before")
    handle = funicular.save(run.model, run.opt, tmp_path / "aside", wait=False)
    run.train(2, look=False)
    handle.wait()
    assert_same_files(tmp_path / "before", tmp_path / "aside")
    if kind is funicular.AdamW:
        return
    with torch.no_grad():
        saves = [funicular.save(run.model, run.opt, tmp_path / f"{i}", wait=False) for i in range(3)]
        run.model.out.weight.add_(1)
    for handle in saves:
        try:
            handle.wait()
        except funicular.RuntimeFailure as error:
            assert error.code == "FN-E411"
            assert "out.weight" in str(error)
    assert sum(name.isdigit() for name in facts.files(str(tmp_path))) == sum(h.path.exists() for h in saves)


def test_many_in_a_row(nvme_world: World, tmp_path: Path):
    """Each waits for the one before; steps between them."""
    run = begin(nvme_world)
    handles = []
    for step in range(6):
        run.train(1, look=False)
        handles.append(funicular.save(run.model, run.opt, tmp_path / f"s{step}", wait=False, keep=3))
    handles[-1].wait()
    assert sorted(facts.files(str(tmp_path))) == ["s3", "s4", "s5"]
    again = begin(nvme_world)
    for step in (3, 4, 5):
        assert funicular.load(tmp_path / f"s{step}", again.model, again.opt).step == step + 1
    torch.manual_seed(5)
    expected = go_on(run)
    torch.manual_seed(5)
    match(expected, go_on(again))


def test_an_error_is_told_by_the_handle_or_by_the_next_save(host_world: World, tmp_path: Path):
    """Training goes on as if nothing had been; the next save tells once, and the one after it works."""
    small = stack(lambda: Block(32), width=32)  # a file of it is one write
    alone = begin(host_world, small)
    alone.train(2, look=False)
    expected = go_on(alone)
    run = begin(host_world, small, debug={"faults": "write:enospc@1x2"})
    run.train(2, look=False)
    told = funicular.save(run.model, None, tmp_path / "a", wait=False)
    for _ in range(2):
        with pytest.raises(
            funicular.StorageError, match=r"FN-E401.*/model\.safetensors.*No space left.*Free space"
        ) as info:
            told.wait()
        assert info.value.errno == 28
    silent = funicular.save(run.model, None, tmp_path / "b", wait=False)
    while not silent.done():
        pass
    with pytest.raises(funicular.StorageError, match="FN-E401"):
        funicular.save(run.model, run.opt, tmp_path / "c")
    funicular.save(run.model, run.opt, tmp_path / "d")
    assert facts.files(str(tmp_path)) == ["d"]
    match(expected, go_on(run))


def test_cancel(two_worlds: World, tmp_path: Path):
    """Nothing stays, and steps that waited go on."""
    run = slow(two_worlds)
    run.train(2, look=False)
    handle = saved_aside(run, tmp_path / "c")
    handle.cancel()
    run.train(2, look=False)
    with pytest.raises(funicular.RuntimeFailure, match="FN-E412"):
        handle.wait()
    assert facts.files(str(tmp_path)) == []
    funicular.save(run.model, run.opt, tmp_path / "d")


def test_interrupted(two_worlds: World, disk: str, tmp_path: Path):
    """Ctrl-C during a save that is waited for: given up, nothing stays, training and saving go on."""
    body = f"""
    from test_checkpoint_async import slow
    run = slow(world)
    run.train(1, look=False)
    try:
        threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while True:
            funicular.save(run.model, run.opt, {str(tmp_path / "c")!r}, overwrite=True, shard_bytes=20_000)
    except KeyboardInterrupt:
        print("interrupted")
    run.train(1, look=False)
    funicular.save(run.model, run.opt, {str(tmp_path / "d")!r})
    """
    placement = PLACEMENTS["host" if two_worlds.params == "host" else "nvme-threads"]
    assert children.succeed(body, disk, placement, DEVICE) == ["interrupted"]
    assert "d" in os.listdir(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("end", ["pass", "del run", "funicular.unwrap(run.model)", "sys.exit(0)"])
def test_the_end_of_the_process_or_model_waits(end: str, disk: str, tmp_path: Path):
    """A save that was asked for is made, even if the model or the script ends."""
    body = f"""
    from test_checkpoint_async import slow
    run = slow(world)
    run.train(2, look=False)
    funicular.save(run.model, run.opt, {str(tmp_path / "c")!r}, wait=False, shard_bytes=20_000)
    {end}
    """
    children.succeed(body, disk, PLACEMENTS["nvme-threads"], DEVICE, whole_end=True)
    assert facts.files(str(tmp_path)) == ["c"]
    run = begin(World(DEVICE, (disk,)))
    assert funicular.load(tmp_path / "c", run.model, run.opt).step == 2
    run = None
    gc.collect()


def test_a_forked_child_leaves_it_alone(host_world: World, tmp_path: Path):
    run = slow(host_world)
    run.train(1, look=False)
    handle = saved_aside(run, tmp_path / "c")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not handle.done() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    handle.wait()
    assert facts.files(str(tmp_path)) == ["c"]


@pytest.mark.parametrize("wait", [True, False])
def test_inside_a_forward_or_backward(two_worlds: World, tmp_path: Path, wait: bool):
    """The state of the last step is saved, and the forward and backward around it go on with the same bits."""

    def script(run: Run) -> None:
        run.model = run.wrap(Stack())
        run.opt = run.adamw()
        run.train(2)

        names = iter(["c0", "c1"])

        def saves(*_: Any) -> None:
            if run.offloaded:
                funicular.save(run.model, run.opt, tmp_path / next(names), wait=wait)

        forward = run.model.layers[2].up.register_forward_hook(saves)
        loss = run.model(run.data(4, WIDTH))
        forward.remove()
        loss.register_hook(saves)
        loss.mean().backward()
        run.record_grads()
        if run.offloaded:
            funicular.save(run.model, run.opt, tmp_path / "right")
            check(tmp_path)
        run.opt.step()
        run.opt.zero_grad()
        run.train(1)

    def check(folder: Path) -> None:
        right = Stack()
        funicular.load(folder / "right", right, funicular.AdamW(right.parameters()))
        for name in ("c0", "c1"):
            model = Stack()
            opt = funicular.AdamW(model.parameters())
            assert funicular.load(folder / name, model, opt).step == 2
            for p, q in zip(model.parameters(), right.parameters(), strict=True):
                assert torch.equal(p, q)

    compare(two_worlds, None, script)


def test_a_weight_edited_in_a_forward_is_not_missed(host_world: World, tmp_path: Path):
    """Its edit is not home before the window closes: an error by name, and nothing is written."""
    run = begin(host_world, Stack)
    seen = []

    def hook(*_: Any) -> None:
        with torch.no_grad():
            run.model.layers[2].up.weight.mul_(0.5)
        with pytest.raises(funicular.UsageError, match=r"FN-E408.*layers\.2\.up\.weight.*between steps"):
            funicular.save(run.model, run.opt, tmp_path / "c")
        seen.append(True)

    run.model.layers[2].up.register_forward_hook(hook)
    with torch.no_grad():
        run.model(run.data(4, WIDTH))
    assert seen
    assert facts.files(str(tmp_path)) == []


def test_a_load_inside_a_forward_is_refused(host_world: World, tmp_path: Path):
    run = begin(host_world, Stack)
    funicular.save(run.model, run.opt, tmp_path / "c")
    seen = []

    def hook(*_: Any) -> None:
        with pytest.raises(funicular.UsageError, match=r"FN-E408.*between steps"):
            funicular.load(tmp_path / "c", run.model, run.opt)
        seen.append(True)

    run.model.layers[2].up.register_forward_hook(hook)
    run.model(run.data(4, WIDTH)).mean().backward()
    assert seen


def test_everything_is_given_back(two_worlds: World, tmp_path: Path):
    """Threads, files and memory of the budget, after saves and loads that end well or not."""
    run = begin(two_worlds, Stack)
    run.train(1, look=False)
    funicular.save(run.model, run.opt, tmp_path / "c", overwrite=True)
    files, threads, used = facts.open_files(), facts.threads(), funicular.stats(run.model).budgets["host"].used
    for _ in range(3):
        funicular.save(run.model, run.opt, tmp_path / "c", overwrite=True, wait=False).wait()
        funicular.load(tmp_path / "c", run.model, run.opt)
        handle = funicular.save(run.model, run.opt, tmp_path / "d", wait=False)
        handle.cancel()
        with contextlib.suppress(funicular.RuntimeFailure):
            handle.wait()
        with pytest.raises(funicular.UsageError):
            funicular.load(tmp_path / "nowhere", run.model, run.opt)
    assert funicular.stats(run.model).budgets["host"].used == used
    facts.eventually(lambda: facts.open_files() <= files and facts.threads() <= threads)


SPARE = {"optimizer": {"spare": "32MiB"}}


def train_ahead(run: Run, steps: int) -> None:
    """Steps whose updates have time to begin during backward."""
    for _ in range(steps):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        facts.rest(0.03)
        run.opt.step()
        run.opt.zero_grad()


def test_what_is_in_its_spare_place_is_saved_as_it_is(host_world: World, tmp_path: Path):
    """Updates that begin during backward go on while a save reads; neither sees the other."""
    alone = begin(host_world, stack(), **SPARE)
    train_ahead(alone, 4)
    funicular.save(alone.model, alone.opt, tmp_path / "waited", shard_bytes=30_000)
    train_ahead(alone, 3)
    run = slow(host_world, stack(), **SPARE)
    train_ahead(run, 4)
    assert funicular.stats(run.model).ahead.used >= 5
    handle = saved_aside(run, tmp_path / "aside")
    assert not handle.done()
    train_ahead(run, 3)
    handle.wait()
    assert_same_files(tmp_path / "waited", tmp_path / "aside")
    for (name, a), b in zip(alone.model.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(a.detach(), b.detach()), name


def edit_weights(run: Run) -> None:
    with torch.no_grad():
        for p in reversed(list(run.model.parameters())):
            p.mul_(0.5)


def edit_states(run: Run) -> None:
    for p in reversed(list(run.model.parameters())):
        run.opt.state[p]["exp_avg"].mul_(0.5)


@pytest.mark.parametrize("edit", [edit_weights, edit_states], ids=lambda e: e.__name__)
@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize(
    "faults", ["", "home:delay=20ms", "write:delay=20ms@1x1000000"], ids=["", "slow home", "slow disk"]
)
def test_edits_right_after_the_call(host_world: World, tmp_path: Path, edit, steps: int, faults: str):
    """Of what is in either place."""
    alone = begin(host_world, stack(), **SPARE)
    train_ahead(alone, steps)
    funicular.save(alone.model, alone.opt, tmp_path / "waited", shard_bytes=30_000)
    run = begin(host_world, stack(), **SPARE, debug={"faults": faults})
    train_ahead(run, steps)
    handle = saved_aside(run, tmp_path / "aside")
    edit(run)
    handle.wait()
    assert_same_files(tmp_path / "waited", tmp_path / "aside")


@pytest.mark.parametrize("steps", [3, 4])
def test_a_step_between_a_save_given_up_and_the_next(host_world: World, tmp_path: Path, steps: int):
    """The copies home that the first one asked for are still on their way when the second one begins."""

    def trained(faults: str) -> Run:
        # No step waits for its updates: something comes from NVMe.
        override = [{"match": "layers.3*", "optimizer": "nvme"}]
        run = begin(host_world, stack(), **SPARE, override=override, debug={"faults": faults})
        train_ahead(run, steps)
        run.model(run.data(4, WIDTH)).square().mean().backward()
        facts.rest(0.03)
        return run

    alone = trained("")
    alone.opt.step()
    funicular.save(alone.model, alone.opt, tmp_path / "waited")
    run = trained("home:delay=300ms")
    given_up = funicular.save(run.model, run.opt, tmp_path / "given up", wait=False)
    given_up.cancel()
    with contextlib.suppress(funicular.Error):
        given_up.wait()
    run.opt.step()
    funicular.save(run.model, run.opt, tmp_path / "aside", wait=False).wait()
    assert_same_files(tmp_path / "waited", tmp_path / "aside")
