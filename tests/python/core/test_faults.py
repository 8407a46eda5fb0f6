"""Disks that fail, at every stage: recovered exactly, or an error with a name; never a hang, never a wrong bit."""

from __future__ import annotations

import gc
import re

import pytest
import torch

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import CUDA, WIDTH, Stack, stack
from twin import Mismatch, Run, World, compare

pytestmark = pytest.mark.io_engines

FOREVER = 10**9
#: Offloading writes every unit once; far behind that, training is under way.
LATER = 60

RECOVERED = {
    "short reads": f"read:short@1x{FOREVER}",
    "short writes": f"write:short@1x{FOREVER}",
    "one failed read": "read:eio@9",
    "one failed write": f"write:eio@{LATER}",
    "first read fails three times": "read:eio@1x3",
    "first write fails three times": "write:eio@1x3",
    "slow reads": "read:delay=1ms@1x200",
    "slow writes": "write:delay=1ms@1x200",
    "all at once": "read:short@3x50,write:short@20x50,read:eio@70,write:eio@90,read:delay=1ms@100x40",
}


@pytest.fixture(params=["nvme-threads", "nvme-io_uring", "states-only"])
def disk_world(request: pytest.FixtureRequest, disk: str, io_uring: bool) -> World:
    """Everything on disk with both engines, and the states only."""
    if request.param == "states-only":
        return World(DEVICE, (disk,), "host", "nvme")
    if request.param == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    return World(DEVICE, (disk,), **PLACEMENTS[request.param])


@pytest.mark.parametrize("fault", RECOVERED)
def test_recovered(fault: str, disk_world: World):
    """What the system may do to a healthy program, and one lost try: no bit differs."""
    compare(disk_world, stack(), lambda run: run.train(4), debug={"faults": RECOVERED[fault]})


FATAL = {
    "reads fail": (f"read:eio@25x{FOREVER}", "FN-E301", 5, ("read", "drive")),
    "writes fail": (f"write:eio@{LATER}x{FOREVER}", "FN-E301", 5, ("writ", "drive")),
    "disk full": (f"write:enospc@{LATER}x{FOREVER}", "FN-E301", 28, ("writ",)),
    "a bit flips": (f"read:flip@25x{FOREVER}", "FN-E302", None, ("checksum|not the bytes",)),
    "one bit flips": ("read:flip@25", "FN-E302", None, ("checksum|not the bytes",)),
    "a write is lost": (f"write:lost@{LATER}x{FOREVER}", "FN-E302", None, ("checksum|not the bytes",)),
    "a read is lost": (f"read:lost@25x{FOREVER}", "FN-E302", None, ("checksum|not the bytes",)),
}


def until_it_fails(run: Run, steps: int = 40) -> funicular.Error:
    """Train, and catch what comes."""
    with pytest.raises(funicular.Error) as info:
        run.train(steps, look=False)
    return info.value


@pytest.mark.parametrize("fault", FATAL)
def test_fatal(fault: str, disk_world: World, disk: str):
    """A named error at the next call; the same again at later ones; then everything can be let go of."""
    text, code, number, says = FATAL[fault]
    files, threads = facts.open_files(), facts.threads()
    run = Run(disk_world, True)
    run.model = run.wrap(Stack(), debug={"faults": text})
    run.opt = run.adamw()
    error = until_it_fails(run)
    assert isinstance(error, funicular.StorageError)
    assert isinstance(error, OSError)
    assert error.code == code
    assert error.errno == number
    assert disk in str(error)
    for part in says:
        assert re.search(part, str(error)), error
    # The cause stays the cause.
    for _ in range(2):
        with pytest.raises(funicular.StorageError, match=code):
            run.model(run.data(4, WIDTH))
    funicular.stats(run.model)
    run = error = None
    facts.forget_backwards()
    gc.collect()
    facts.eventually(lambda: facts.open_files() <= files)  # by threads, as they end
    facts.eventually(lambda: facts.threads() <= threads)
    assert not facts.files(disk)


@pytest.fixture(params=["threads", "io_uring"])
def engine(request: pytest.FixtureRequest, io_uring: bool) -> str:
    """Both I/O engines."""
    if request.param == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    return str(request.param)


@pytest.mark.parametrize("fault", ["reads fail", "writes fail", "disk full", "one bit flips"])
def test_weights_in_host_memory_survive(fault: str, engine: str, disk: str):
    """Each parameter can be read, and holds its value before or after the step that failed; unwrap works."""
    world = World(DEVICE, (disk,), "host", "nvme", engine)
    runs = []
    for offloaded in (False, True):
        run = Run(world, offloaded)
        run.model = run.wrap(Stack(), debug={"faults": FATAL[fault][0]})
        run.opt = run.adamw()
        runs.append(run)
    plain, paged = runs
    history = [weights(plain)]
    for _ in range(40):
        plain.train(1, look=False)
        history.append(weights(plain))
    until_it_fails(paged)
    failed_at = len([1 for name, _ in paged.notes if name == "loss"])
    allowed = history[max(0, failed_at - 3) : failed_at + 1]
    assert_each_is_one_of(weights(paged), allowed)
    funicular.unwrap(paged.model)
    assert_each_is_one_of(weights(paged), allowed)
    assert not facts.files(disk)
    paged.opt = torch.optim.SGD(paged.model.parameters(), lr=1e-3)
    paged.opt.zero_grad()
    paged.train(1, look=False)


def test_states_that_are_lost_are_missed(engine: str, disk: str):
    """Unwrapped after a failure, the optimizer does not go on with blank moments; a new one does."""
    run = Run(World(DEVICE, (disk,), "host", "nvme", engine), True)
    run.model = run.wrap(Stack(), debug={"faults": FATAL["reads fail"][0]})
    run.opt = run.adamw()
    until_it_fails(run)
    funicular.unwrap(run.model)
    run.opt.zero_grad()
    with pytest.raises(funicular.StorageError, match="FN-E301"):
        run.train(1, look=False)
    with pytest.raises(funicular.StorageError, match="FN-E301"):
        run.opt.state_dict()
    run.opt = run.adamw()
    run.opt.zero_grad()
    run.train(1, look=False)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def assert_each_is_one_of(found: dict[str, torch.Tensor], allowed: list[dict[str, torch.Tensor]]) -> None:
    for name, value in found.items():
        assert any(torch.equal(value, other[name]) for other in allowed), name


@pytest.mark.parametrize("fault", ["read:eio@1x1000", "write:eio@1x1000", "write:enospc@3x1000"])
def test_while_offloading(fault: str, engine: str, disk: str):
    """The very first bytes fail: either the call does, with the model as it was, or a later one by name."""
    world = World(DEVICE, (disk,), "nvme", "nvme", engine)
    model = Stack()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.ones(4, WIDTH).to(world.torch_device)
    if fault.startswith("write"):
        with pytest.raises(funicular.StorageError, match="FN-E301"):
            funicular.offload(model, world.policy(model, debug={"faults": fault}))
        assert all(type(p) is torch.nn.Parameter for p in model.parameters())
        assert all(torch.equal(p, before[name].to(p.device)) for name, p in model.named_parameters())
        assert not facts.files(disk)
        assert facts.saved_tensor_hooks() == 0
        funicular.offload(model, world.policy(model))
        model(x).mean().backward()
    else:
        funicular.offload(model, world.policy(model, debug={"faults": fault}))
        with pytest.raises(funicular.StorageError, match="FN-E301"):
            model(x)


@pytest.mark.parametrize("what", ["weights", "states", "gradients"])
def test_read_outside_a_step(what: str, engine: str, disk: str):
    """A stray read that fails is an error there and then, not stale memory."""
    world = World(DEVICE, (disk,), "nvme", "nvme", engine)
    run = Run(world, True)
    # Somewhere in the reads below: units have more blocks on a GPU.
    run.model = run.wrap(Stack(), debug={"faults": f"read:eio@{1500 if CUDA else 200}x{FOREVER}"})
    run.opt = run.adamw()
    run.train(2, look=False)
    run.model(run.data(4, WIDTH)).mean().backward()

    def read() -> None:
        for p in run.model.parameters():
            if what == "weights":
                p.detach().sum()
            elif what == "states":
                run.opt.state[p]["exp_avg"].sum()
            else:
                p.grad.sum()

    if what == "gradients":  # they never go to NVMe
        read()
        return
    with pytest.raises(funicular.StorageError, match="FN-E301"):
        for _ in range(60):
            read()
            run.train(1, look=False)


def test_checksums_off_is_a_choice(disk: str):
    """Without checksums the flipped bit is not noticed: what the option says, and that the tests above can fail."""
    world = World(DEVICE, (disk,), "nvme", "nvme")

    def script(run: Run) -> None:
        run.train(4)

    with pytest.raises(Mismatch):
        compare(world, stack(), script, debug={"faults": f"read:flip@25x{FOREVER}"}, nvme={"checksums": False})


# ------------------------------------------------------------------ interruptions

INTERRUPTED = """
class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        if where == "forward": time.sleep(NAP)
        return x.view_as(x)
    @staticmethod
    def backward(ctx, g):
        if ctx.where == "backward": time.sleep(NAP)
        return g, None

def alarm(after):
    at = []
    def fire():
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    threading.Timer(after, fire).start()
    return at

def interrupted(label, run, where, hook):
    handle = run.model.layers[3].register_forward_hook(lambda m, a, o: Slow.apply(o, where)) if hook else None
    try:
        loss = None
        if where == "forward":
            at = alarm(0.3)
            run.model(x)
        else:
            loss = run.model(x).square().mean()
            at = alarm(0.3)
            loss.backward()
        print(label, "not interrupted")
    except KeyboardInterrupt:
        print(label, "late" if time.monotonic() - at[0] > NAP / 2 else "in time")
    if handle is not None: handle.remove()
    run.opt.zero_grad()

def script(run):
    global x
    run.model = run.wrap(Stack(), debug={"faults": FAULTS})
    run.opt = run.adamw()
    x = run.data(4, WIDTH)
    run.train(2)
    for where in ("forward", "backward"):
        if run.offloaded: interrupted(where, run, where, HOOK)
        run.train(2)
from twin import compare
compare(world, None, script)
print("exact")
"""


def test_interrupted_in_user_code(engine: str, disk: str):
    """Ctrl-C in a slow module, in forward and in backward: KeyboardInterrupt, then exact training."""
    # Long enough that a busy machine is in time; a GPU's backward sleeps to the end.
    body = f"FAULTS, HOOK, NAP = '', True, {3 if CUDA else 30}\n" + INTERRUPTED
    lines = children.succeed(body, disk, PLACEMENTS[f"nvme-{engine}"], DEVICE)
    # A GPU's backward runs in a thread of autograd; torch's own wait for it looks at no signals.
    assert lines == ["forward in time", f"backward {'late' if CUDA else 'in time'}", "exact"]


@pytest.mark.timing
def test_interrupted_while_waiting_for_the_disk(disk: str, io_uring: bool):
    """Ctrl-C while a page-in hangs: the wait ends at once, the read when it can; then exact training.

    With both engines at once: both programs sleep nearly all the time.
    """
    body = """
    from twin import compare
    def script(run):
        run.model = run.wrap(Stack(depth=12), debug={"faults": "AT"})
        run.opt = run.adamw()
        run.train(2)  # what is done once takes seconds on a GPU
        for step in range(12):
            x = run.data(4, WIDTH)
            done = threading.Event()
            def nag():
                if not done.wait(0.3):
                    at.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)
            at = []
            if run.offloaded: threading.Thread(target=nag).start()
            while True:
                try:
                    phase = "forward"
                    loss = run.model(x).square().mean()
                    phase = "backward"
                    loss.backward()
                    done.set()
                    break
                except KeyboardInterrupt:
                    print(phase, "late" if time.monotonic() - at[0] > 0.7 else "in time", flush=True)
                    run.opt.zero_grad()
            run.record("loss", loss)
            run.record_grads()
            run.opt.step()
            run.opt.zero_grad()
    compare(world, None, script)
    print("exact")
    """
    # Every read is one of parameters, that forward and backward wait for. How many there are depends on the device.
    slow = (230, 420, 560, 760, 1030, 1390)
    body = body.replace("AT", ",".join(f"read:delay=1500ms@{at}x1" for at in slow))
    engines = ["threads", "io_uring"] if io_uring else ["threads"]
    placements = [PLACEMENTS[f"nvme-{engine}"] | {"optimizer": "host"} for engine in engines]
    begun = [children.begin(body, disk, placement, DEVICE) for placement in placements]
    for engine, process in zip(engines, begun, strict=True):
        *said, last = children.lines(process)
        assert last == "exact", engine
        assert "forward in time" in said, engine
        # As above: torch's wait for a GPU's backward looks at no signals.
        late = {"backward late"} if CUDA else set()
        assert set(said) - {"forward in time", "backward in time"} <= late, engine


def test_process_ends_after_a_failure(engine: str, disk: str):
    """The error is printed, and the process ends by itself soon after."""
    body = f"""
    sys.excepthook = lambda kind, error, where: print(error.code, flush=True)
    model = Stack()
    funicular.offload(model, world.policy(model, debug={{"faults": "write:eio@{LATER}x{FOREVER}"}}))
    opt = funicular.AdamW(model.parameters())
    while True:
        model(torch.ones(4, WIDTH).to(world.torch_device)).mean().backward()
        opt.step()
    """
    process = children.start(body, disk, PLACEMENTS[f"nvme-{engine}"], DEVICE)
    assert process.stdout.readline() == "FN-E301\n"
    status, _, err = children.finish(process)
    assert status == 1, err
    assert "panicked" not in err
    assert not facts.files(disk)
