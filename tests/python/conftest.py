"""Fixtures: the device, the placements and I/O engines a case runs with, a real disk, and the leak check."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ.get("FUNICULAR_TEST_DEVICE", "host") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests of the host device go the same way on a machine with a GPU
# torch's compiler starts six processes, each of which imports torch, to see whether this machine runs what its compiler makes.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

gc.disable()  # until all is imported and collected: nothing of that is garbage

import pytest
import torch

import facts
import forks
import funicular
from covering import thin
from models import CUDA, Stack
from twin import World

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # What a script starts with & ignores Ctrl-C, and so would every process that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
for name in funicular.__all__:
    getattr(funicular, name)  # imports what it needs: now, not within a test
torch.set_num_threads(1)  # one order of summation, and no pools that compete with the runtime's
if CUDA:
    torch.use_deterministic_algorithms(True)
    facts.get_ahead()

#: The file of tests before which everything alive was put aside.
FROZEN = pytest.StashKey[Path]()

DEVICE = "cuda" if CUDA else "host"
#: Processors that other programs may keep busy beside a test that judges by times.
BUSY = 0.25
#: A disk, not a tmpfs: pytest's own tmp_path often is one.
DISK = Path(os.environ.get("FUNICULAR_TEST_DIR", "/var/tmp"))

PLACEMENTS = {
    "host": {"params": "host", "optimizer": "host", "engine": "threads"},
    "nvme-threads": {"params": "nvme", "optimizer": "nvme", "engine": "threads"},
    "nvme-io_uring": {"params": "nvme", "optimizer": "nvme", "engine": "io_uring"},
    "nvme-gradients": {"params": "nvme", "optimizer": "nvme", "gradients": "nvme", "engine": "threads"},
}
#: For questions of autograd, which no I/O engine answers: with the engine that works everywhere.
TWO_PLACEMENTS = ["host", "nvme-threads"]
#: For questions about gradients.
OF_GRADIENTS = [*TWO_PLACEMENTS, "nvme-gradients"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--worlds",
        default=",".join(PLACEMENTS),
        help="only the cases in these placements, of %(default)s; and all those that run in none by name",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="all cases of the tests with the mark covering, of which some stand for the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    """What torch's compiler makes is kept for this run alone, since code of another day may be for another instruction set; and for
    this process, since two that compile at once can spoil each other's precompiled headers.
    """
    if hasattr(config, "workerinput") or "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="funicular-inductor-")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """The processes that share the tests are forks of one that has imported what they need. A GPU is for processes that begin anew."""
    if not CUDA:
        forks.fork_workers()


def in_worlds(item: pytest.Item, worlds: set[str]) -> bool:
    """Whether all placements that a case names among its parameters are wanted."""
    call = getattr(item, "callspec", None)
    named = {value for value in call.params.values() if isinstance(value, str)} if call else set()
    return worlds.issuperset(named & PLACEMENTS.keys())


def stood_for(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases with all but gradients on disk, of which the same case with gradients there, too, asks more of the same engine.

    With gradients in host memory the same is asked with io_uring, or in the tests that have no more than two placements.
    """
    known: dict[tuple[object, ...], pytest.Item] = {}
    more: set[tuple[object, ...]] = set()
    for item in items:
        params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        world = params.pop("world", None)
        if world in ("nvme-threads", "nvme-gradients"):
            case = (item.parent, item.originalname, *sorted((name, id(value)) for name, value in params.items()))
            if world == "nvme-threads":
                known[case] = item
            else:
                more.add(case)
    return [item for case, item in known.items() if case in more]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one; all others run on whichever device is chosen, in the chosen worlds."""
    worlds = set(config.getoption("--worlds").split(","))
    if unknown := worlds - PLACEMENTS.keys():
        raise pytest.UsageError(
            f"--worlds: no placement {', '.join(sorted(unknown))}; known are {', '.join(PLACEMENTS)}"
        )
    left_out = {item for item in items if not in_worlds(item, worlds)}
    if not config.getoption("--full"):
        left_out.update(stood_for([item for item in items if item not in left_out]))
        left_out.update(thin([item for item in items if item not in left_out]))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
    skip = pytest.mark.skip(reason="needs FUNICULAR_TEST_DEVICE=cuda")
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.enable()
    facts.compile_sooner()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What the imports, the collection of the tests and the files before made stays out of later collections: 0.1 s each otherwise."""
    if item.config.stash.get(FROZEN, None) != item.path:
        item.config.stash[FROZEN] = item.path
        gc.collect()
        gc.freeze()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test that failed had in hand goes once it is told: a model kept by a traceback would fail this test again, or others."""
    report = yield
    if report.failed and call.excinfo is not None and not item.config.getoption("usepdb"):
        facts.forget_frames(call.excinfo.value)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """What judges by times can judge on a quiet machine only: where other programs kept a processor busy, a failure says nothing."""
    if not pyfuncitem.get_closest_marker("timing"):
        return (yield)
    before = facts.busy()
    try:
        return (yield)
    except AssertionError as error:
        others = facts.others_since(before)
        if others < BUSY:
            raise
        pytest.skip(f"other programs took {others:.1f} processors, and the times were wrong: {str(error)[:200]}")


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """A test leaves the process as it found it: the next one must not fail, or pass, because of it."""
    before, told = facts.process(), facts.for_accelerate()
    yield
    after = facts.process()
    facts.restore(before)
    # The Trainer's arguments leave it there for this process, and its children.
    for name in facts.for_accelerate().keys() - told.keys():
        del os.environ[name]
    os.environ.update(told)
    assert after == before


@pytest.fixture
def disk() -> Iterator[str]:
    """An empty directory on a real disk; the runtime must leave it empty."""
    path = tempfile.mkdtemp(prefix="test-funicular-", dir=DISK)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def io_uring() -> bool:
    """True where io_uring works: containers often forbid it."""
    path = tempfile.mkdtemp(prefix="test-funicular-", dir=DISK)
    world = World(DEVICE, (path,), **PLACEMENTS["nvme-io_uring"])
    model = Stack(depth=2)
    try:
        funicular.offload(model, world.policy(model))
    except funicular.Error as error:
        if "FN-E601" not in str(error):
            raise
        return False
    finally:
        shutil.rmtree(path, ignore_errors=True)
    funicular.unwrap(model)
    return True


#: Its hooks close over the model and hang on parameters: torch keeps such a model, ordinary or offloaded, to the end of the
#: process, which test_torch_keeps.py shows with torch alone.
KEEP_THEIR_MODEL = {"test_post_accumulate_hooks"}


def make_world(name: str, disk: str, io_uring: bool) -> World:
    placement = PLACEMENTS[name]
    if placement["engine"] == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    return World(DEVICE, (disk,), **placement)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Questions that the I/O engine could answer differently are asked with both engines: those marked ``io_engines``. Those marked
    ``gradients`` are asked with gradients on disk, too.
    """
    if "world" in metafunc.fixturenames:
        marked = {mark.name for mark in metafunc.definition.iter_markers()}
        few = OF_GRADIENTS if "gradients" in marked else TWO_PLACEMENTS
        metafunc.parametrize("world", PLACEMENTS if "io_engines" in marked else few, indirect=True)


@pytest.fixture
def world(request: pytest.FixtureRequest, disk: str, io_uring: bool) -> Iterator[World]:
    """All in host memory, and all on disk; on disk with both I/O engines for tests marked ``io_engines``."""
    yield make_world(request.param, disk, io_uring)
    if request.node.originalname not in KEEP_THEIR_MODEL:
        try:
            facts.eventually(lambda: nothing_left(disk), 20)
        except AssertionError:
            pytest.fail(f"left behind: {residue(disk)}")


def nothing_left(disk: str) -> bool:
    """Whether a model is gone: cycles of user code may keep one alive, what only a kept graph held goes a pass later, and where
    autograd's thread of a GPU let the graph go last, it is that thread that ends the runtime.
    """
    if residue(disk):
        gc.collect()
    return not residue(disk)


def residue(disk: str) -> list[str]:
    """What a model that is gone left behind: files, hooks on this thread's stack."""
    left = [f"file {p.name}" for p in Path(disk).iterdir()]
    return left + ["saved tensor hooks"] * facts.saved_tensor_hooks()


@pytest.fixture(params=TWO_PLACEMENTS)
def two_worlds(request: pytest.FixtureRequest, disk: str) -> World:
    """All in host memory, and all on disk with the engine that works everywhere."""
    return make_world(request.param, disk, False)


@pytest.fixture
def host_world(disk: str) -> World:
    """Parameters and states in host memory: for what does not depend on the disk."""
    return make_world("host", disk, False)


@pytest.fixture
def states_world(disk: str) -> World:
    """Parameters in host memory, states on disk in small pieces, with the engine that works everywhere."""
    return dataclasses.replace(make_world("host", disk, False), optimizer="nvme", host="" if CUDA else "6MiB")


@pytest.fixture
def nvme_world(disk: str) -> World:
    """Parameters and states on disk, with the engine that works everywhere."""
    return make_world("nvme-threads", disk, False)
