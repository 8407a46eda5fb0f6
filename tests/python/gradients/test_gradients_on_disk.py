"""Gradients that live on NVMe: the bits of plain PyTorch in every use, within the least host memory that the model fits in."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable

import pytest
import torch

import cgroups
import children
import facts
import funicular
from conftest import DEVICE
from models import CUDA, Block, stack
from mutations import wrap
from twin import Mismatch, Run, World, compare

#: Beside the least host memory there is room for the gradients of two of its blocks.
DEPTH, WIDE = 8, 128
build = stack(lambda: Block(WIDE), DEPTH, width=WIDE)


def least_host(world: World, dtype: torch.dtype = torch.float32) -> int:
    """The smallest host budget that the model fits in, as the error names it, in bytes."""
    model = build().to(dtype)
    with pytest.raises(funicular.BudgetError, match="FN-E202") as caught:
        funicular.offload(model, world.policy(model, budget={"host": "4KiB"}))
    found = re.search(r"Raise budget\.host to ([0-9]+)([KM])iB", str(caught.value))
    assert found, str(caught.value)
    return int(found[1]) << {"K": 10, "M": 20}[found[2]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What reads and writes are asked for is the same with both engines: few tests look at these."""
    if "paged" in metafunc.fixturenames:
        both = any(metafunc.definition.iter_markers("io_engines"))
        metafunc.parametrize("paged", ["threads", "io_uring"] if both else ["threads"], indirect=True)


@pytest.fixture
def paged(request: pytest.FixtureRequest, disk: str, io_uring: bool) -> World:
    """Everything on disk."""
    if request.param == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    return World(DEVICE, (disk,), "nvme", "nvme", request.param, gradients="nvme")


@pytest.fixture
def tight(paged: World) -> Callable[..., Run]:
    """Compare a script in the least host memory."""

    def check(script: Callable[[Run], None], dtype: torch.dtype = torch.float32) -> Run:
        least = least_host(paged, dtype)
        run = compare(paged, lambda: build().to(dtype), script, budget={"host": f"{least}B"})
        assert funicular.stats(run.model).budgets["host"].peak <= least
        return run

    return check


def backward(run: Run) -> None:
    run.model(run.data(4, WIDE)).square().mean().backward()


@pytest.mark.io_engines
def test_they_are_there(paged: World) -> None:
    run = Run(paged, True)
    run.model = run.wrap(build())
    run.opt = run.adamw()
    run.train(1, look=False)
    size = sum(p.nbytes for p in run.model.parameters())
    assert funicular.stats(run.model).budgets["nvme"].used >= 4 * size
    # Parameters once as the model moved in; in each step they, both moments (fp32 has no remainder) and gradients.
    run.train(2, look=False)
    facts.eventually(lambda: funicular.stats(run.model).links["nvme_write"].bytes >= (1 + 3 * 4) * size)


@pytest.mark.io_engines
def test_steps(tight) -> None:
    tight(lambda run: run.train(4, look=False))


def test_steps_that_look(tight) -> None:
    """Each gradient is read between backward and step."""
    tight(lambda run: run.train(4))


@pytest.mark.io_engines
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zero"])
def test_accumulation(tight, to_none: bool) -> None:
    def script(run: Run) -> None:
        for _ in range(3):
            for _ in range(3):
                backward(run)
            run.opt.step()
            run.opt.zero_grad(set_to_none=to_none)

    tight(script)


def test_sums_are_made_on_the_device(tight, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient is brought to memory, neither for sums nor for their norms."""
    brought: list[int] = []

    def counted(original):
        def bring(engine, unit, stream):
            brought.append(unit)
            original(engine, unit, stream)

        return bring

    wrap(monkeypatch, "funicular.gradients.paged.bring_gradients", counted)

    def script(run: Run) -> None:
        for _ in range(3):
            for _ in range(3):
                backward(run)
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2))
            run.opt.step()
            run.opt.zero_grad()

    tight(script)
    assert not brought


@pytest.mark.io_engines
def test_held_over_backwards(tight) -> None:
    """What the program holds of a gradient becomes the sum, as autograd adds in place."""

    def script(run: Run) -> None:
        for _ in range(2):
            backward(run)
            held = [run.model.layers[i].up.weight.grad for i in (1, 4)]
            view = run.model.layers[5].up.weight.grad[0]
            backward(run)
            run.record("held", [*held, view])
            del held, view
            run.opt.step()
            run.opt.zero_grad()

    tight(script)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves(tight, dtype: torch.dtype) -> None:
    def script(run: Run) -> None:
        for _ in range(3):
            run.model(run.data(4, WIDE).to(dtype)).float().square().mean().backward()
            run.model(run.data(4, WIDE).to(dtype)).float().square().mean().backward()
            run.opt.step()
            run.opt.zero_grad()

    tight(script, dtype)


@pytest.mark.covering(2)
@pytest.mark.parametrize("max_norm", [1e-3, 1e6], ids=["bites", "idle"])
@pytest.mark.parametrize("foreach", [None, False], ids=["auto", "single"])
def test_clipping(tight, max_norm: float, foreach: bool | None) -> None:
    def script(run: Run) -> None:
        for count in (1, 1, 2):
            for _ in range(count):
                backward(run)
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm, foreach=foreach))
            run.opt.step()
            run.opt.zero_grad()

    tight(script)


def test_edits_in_place(tight) -> None:
    def script(run: Run) -> None:
        for _ in range(3):
            backward(run)
            with torch.no_grad():
                for i, p in enumerate(run.model.parameters()):
                    assert p.grad is not None
                    if i % 3 == 0:
                        p.grad.mul_(0.5)
                    elif i % 3 == 1:
                        p.grad[..., 0] = 1.0
            run.opt.step()
            run.opt.zero_grad()

    tight(script)


def test_other_gradients(tight) -> None:
    """Replaced, taken from another parameter, dropped, kept over a step."""

    def script(run: Run) -> None:
        for _ in range(3):
            backward(run)
            first, second, third = (run.model.layers[i].up.weight for i in (1, 2, 5))
            kept = third.grad
            first.grad = torch.full_like(first, 0.25)
            second.grad = run.model.layers[4].up.weight.grad
            run.model.layers[6].up.weight.grad = None
            run.opt.step()
            run.opt.zero_grad()
            backward(run)
            run.record("kept", kept)
            run.opt.step()
            run.opt.zero_grad()

    tight(script)


def test_hooks_see_sums(tight) -> None:
    def script(run: Run) -> None:
        seen: list[torch.Tensor] = []
        for p in run.model.layers[3].parameters():
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            p.register_hook(lambda grad: grad * 2)
        for _ in range(2):
            backward(run)
            backward(run)
            run.opt.step()
            run.opt.zero_grad()
        run.record("seen", seen)

    tight(script)


@pytest.mark.skipif(CUDA, reason="the scaler of the host")
def test_scaler(tight) -> None:
    def script(run: Run) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for scale in (1.0, float("inf"), 1.0, 1.0):
            loss = run.model(run.data(4, WIDE)).square().mean() * scale
            scaler.scale(loss).backward()
            scaler.unscale_(run.opt)
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-2)
            scaler.step(run.opt)
            scaler.update()
            run.record("scale", scaler.get_scale())
            run.opt.zero_grad()

    tight(script)


@pytest.mark.io_engines
def test_parts_of_the_model(tight) -> None:
    """Backwards that reach some blocks, or some parameters of a block, and one that fails amid it."""

    def script(run: Run) -> None:
        def fail(grad: torch.Tensor) -> None:
            raise ValueError("amid the backward")

        for _ in range(3):
            handle = run.model.layers[4].up.weight.register_hook(fail)
            with pytest.raises(ValueError, match="amid"):
                backward(run)
            handle.remove()
            run.record_grads()
            x = run.data(4, WIDE)
            for layer in run.model.layers[5:7]:
                x = layer(x)
            x.mean().backward()
            run.model.layers[2].up(run.data(2, WIDE)).mean().backward()
            run.opt.step()
            run.opt.zero_grad()
            backward(run)
            run.opt.step()
            run.opt.zero_grad()

    tight(script)


@pytest.mark.io_engines
def test_too_many_at_once(paged: World) -> None:
    """What takes the gradients of all units in one operation is refused by name, and nothing is lost."""

    def script(run: Run) -> None:
        run.train(1, look=False)
        backward(run)
        grads = [p.grad for p in run.model.parameters()]
        if run.offloaded:
            with pytest.raises(funicular.BudgetError, match=r"FN-E205 reading the gradients of"):
                torch._foreach_add(grads, 1.0)
        del grads
        run.opt.step()
        run.opt.zero_grad()

    compare(paged, build, script, budget={"host": f"{least_host(paged)}B"})


@pytest.mark.io_engines
def test_unwrap_and_save(tight, tmp_path) -> None:
    """Gradients of an unfinished step survive both."""

    def script(run: Run) -> None:
        run.train(2, look=False)
        backward(run)
        if run.offloaded:
            funicular.save(run.model, run.opt, tmp_path / "saved")
        run.opt.step()
        run.opt.zero_grad()
        backward(run)
        run.record_grads()

    tight(script)


def test_what_leaves_has_its_gradients(paged: World) -> None:
    def script(run: Run) -> None:
        run.train(2, look=False)
        backward(run)
        if run.offloaded:
            funicular.unwrap(run.model)

    compare(paged, build, script)


@pytest.mark.io_engines
def test_closed_amid_a_backward(paged: World) -> None:
    """What is gathered, or on its way, is let go of."""
    run = Run(paged, True)
    run.model = run.wrap(build())
    run.opt = run.adamw()

    def fail(grad: torch.Tensor) -> None:
        raise ValueError("amid the backward")

    run.model.layers[3].up.weight.register_hook(fail)
    with pytest.raises(ValueError, match="amid"):
        backward(run)
    grad = run.model.layers[7].up.weight.grad
    del run.model, run.opt
    del grad


@pytest.mark.io_engines
@pytest.mark.parametrize("fault", ["eio", "enospc"])
def test_a_disk_that_fails(paged: World, fault: str, tmp_path) -> None:
    """Writes fail from the first of the second step's gradients on: a named error, and what was saved is whole."""
    run = Run(paged, True)
    run.model = run.wrap(build())
    run.opt = run.adamw()
    run.train(1, look=False)
    funicular.save(run.model, run.opt, tmp_path / "saved")
    saved = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    funicular.unwrap(run.model)

    run = Run(paged, True)
    run.model = run.wrap(build(), debug={"faults": f"write:{fault}@90x1000000000"})
    run.opt = run.adamw()
    with pytest.raises(funicular.StorageError, match="FN-E301"):
        run.train(20, look=False)
    del run

    run = Run(paged, True)
    run.model = run.wrap(build())
    run.opt = run.adamw()
    funicular.load(tmp_path / "saved", run.model, run.opt)
    for name, p in run.model.named_parameters():
        assert torch.equal(p.detach(), saved[name])
    run.train(1, look=False)


@pytest.mark.io_engines
def test_a_lost_write_is_noticed(paged: World) -> None:
    run = Run(paged, True)
    run.model = run.wrap(build(), debug={"faults": "write:lost@60x1000000000"})
    run.opt = run.adamw()
    with pytest.raises(funicular.StorageError, match="FN-E302"):
        run.train(20, look=False)


def test_the_judge_notices(paged: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mechanism broken at a time: what was edited is not stored, sums begin anywhere, what others want is dropped."""
    least = least_host(paged)

    def edits(run: Run) -> None:
        for _ in range(2):
            backward(run)
            with torch.no_grad():
                for p in run.model.parameters():
                    p.grad.mul_(0.5)
            run.opt.step()
            run.opt.zero_grad()

    def sums(run: Run) -> None:
        backward(run)
        backward(run)
        run.opt.step()

    def drops(original):
        return lambda engine, unit, wanted, stream: original(engine, unit, False, stream)

    with monkeypatch.context() as patch, pytest.raises(Mismatch):
        wrap(patch, "funicular.gradients.paged.give_gradients", drops)
        compare(paged, build, edits, budget={"host": f"{least}B"})

    with monkeypatch.context() as patch, pytest.raises(Mismatch):
        patch.setattr("funicular.gradients.paged.lift_gradient", lambda *_: True)
        compare(paged, build, sums)

    def parts(run: Run) -> None:
        backward(run)
        run.model.layers[2].up(run.data(2, WIDE)).mean().backward()
        run.model.layers[2].down.weight.grad = None
        run.model.layers[2].down(run.data(2, WIDE)).mean().backward()
        run.opt.step()

    with monkeypatch.context() as patch, pytest.raises(Mismatch):
        patch.setattr("funicular.gradients.arrival.others_wanted", lambda ref, backwards: False)
        compare(paged, build, parts)


@pytest.mark.skipif(CUDA, reason="CUDA's own memory on the host is not in the plan")
def test_in_a_cgroup(disk: str) -> None:
    """A model whose gradients alone are more than the group's memory, with gradients where the planner puts them."""
    body = children.TRAINED + textwrap.dedent("""
    HOST = 80 * MIB
    def build():
        return Stack(block=lambda: __import__("models").Block(1024), depth=18, width=1024)
    model = build()
    open(GROUP + "/cgroup.procs", "w").write(str(os.getpid()))
    funicular.offload(model, policy(model))
    del build
    opt = funicular.AdamW(model.parameters())
    for _ in range(2):
        for _ in range(2):
            model(torch.ones(2, 1024)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    from funicular import testing
    inside = testing.inspect(model)
    homes = [inside.engine.homes(i)[2] for i in range(len(inside.units))]
    assert homes.count("nvme") > len(homes) // 2, homes
    print("trained")
    """)
    body = body.replace('{"budget"', '{"gradients": {"tier": "auto"}, "budget"')
    plan, beside = (3 * 8 + 80) * (1 << 20), 4 * 8 * (1 << 20)
    with cgroups.limited(int(plan * 1.05) + beside) as group:
        body = f"GROUP = {str(group)!r}\n" + body
        placement = {"params": "nvme", "optimizer": "nvme", "engine": "threads"}
        status, out, err = children.finish(children.start(body, disk, placement, DEVICE, children.EXACT))
        facts.eventually(lambda: not (group / "cgroup.procs").read_text())
    assert (status, out) == (0, "trained\n"), f"{status}\n{out}\n{err}"
