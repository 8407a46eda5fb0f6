"""Everything that can go wrong around a checkpoint: an error with a name, nothing lost, and training goes on."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import begin, build, go_on
from test_checkpoint_cli import bad_bit, saved, truncate

import children
import facts
import funicular
from conftest import DEVICE, PLACEMENTS
from models import WIDTH, Stack
from twin import Run, World, match

__all__ = ["saved"]

FOREVER = 10**9


def seeded(run: Run) -> list[tuple[str, Any]]:
    torch.manual_seed(6)
    return go_on(run)


# ---------------------------------------------------------------------- damage


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "longer": lengthen,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a bit of the header": lambda path: bad_bit(path, 200),
    "a bit of the length": lambda path: bad_bit(path, 1),
    "the first bit of the data": lambda path: bad_bit(path, data_of(path)),
    "the last bit": lambda path: bad_bit(path, path.stat().st_size - 1),
}


def data_of(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little") if path.suffix == ".safetensors" else 0


@pytest.mark.covering(1)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_file(damage: str, saved: Path, two_worlds: World, tmp_path: Path):
    """Nothing is lost of a model that has trained: the load fails before it touches anything."""
    alone = begin(two_worlds)
    alone.train(3, look=False)
    expected = seeded(alone)
    run = begin(two_worlds)
    run.train(3, look=False)
    names = sorted(p.name for p in saved.iterdir())
    assert len(names) > 4
    for name in names:
        copy = tmp_path / "damaged"
        shutil.copytree(saved, copy)
        DAMAGE[damage](copy / name)
        with pytest.raises(funicular.Error, match=r"FN-E40[456]") as info:
            funicular.load(copy, run.model, run.opt)
        assert name in str(info.value), info.value
        shutil.rmtree(copy)
    match(expected, seeded(run))


@pytest.mark.covering(1)
@pytest.mark.parametrize("file", ["model-00001-of", "model-00002-of", "optimizer-00002-of"])
def test_damage_found_while_loading(file: str, saved: Path, two_worlds: World):
    """A fresh model has nothing to lose: it is loaded at once, refuses to run on half a load, and takes the next one."""
    name = next(p for p in saved.iterdir() if p.name.startswith(file))
    whole = name.read_bytes()
    first = begin(two_worlds)
    funicular.load(saved, first.model, first.opt)
    expected = seeded(first)
    bad_bit(name, len(whole) - 1)
    run = begin(two_worlds)
    with pytest.raises(funicular.StorageError, match=rf"FN-E406.*{name.name}.*checksum"):
        funicular.load(saved, run.model, run.opt)
    uses: list[Callable[[], Any]] = [
        lambda: run.train(1),
        lambda: run.model.out.weight.sum() if hasattr(run.model, "out") else run.model.embed.weight.sum(),
        lambda: funicular.save(run.model, run.opt, saved.parent / "d"),
    ]
    for use in uses:
        with pytest.raises(funicular.RuntimeFailure, match=r"FN-E410.*failed halfway.*FN-E406"):
            use()
    with pytest.raises(funicular.StorageError, match="FN-E406"):
        funicular.load(saved, run.model, run.opt)
    name.write_bytes(whole)
    funicular.load(saved, run.model, run.opt)
    match(expected, seeded(run))


def test_many_flipped_bits(saved: Path, tmp_path: Path):
    """Anywhere: no flipped bit is loaded. A checksum per four MiB and one per header; the manifest has its own."""
    from funicular import _core

    chance = random.Random(3)
    files = [p for p in sorted(saved.iterdir()) if p.stat().st_size > 0]
    for _ in range(60):
        file = chance.choice(files)
        at = chance.randrange(file.stat().st_size)
        whole = file.read_bytes()
        bad_bit(file, at)
        with pytest.raises(funicular.Error, match=r"FN-E40[56]"):
            _core.Checkpoint(str(saved), True).verify()
        file.write_bytes(whole)
    _core.Checkpoint(str(saved), True).verify()


def test_not_a_checkpoint(two_worlds: World, tmp_path: Path):
    run = begin(two_worlds)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nowhere", "empty", "file", "loop", "loop/below", "nul\0byte"):
        with pytest.raises(funicular.UsageError, match=r"FN-E404.*checkpoint ls"):
            funicular.load(tmp_path / name, run.model, run.opt)
    (tmp_path / "empty" / "funicular.json").write_text("{}")
    with pytest.raises(funicular.StorageError, match=r"FN-E406.*funicular\.json"):
        funicular.load(tmp_path / "empty", run.model, run.opt)
    run.train(1, look=False)


@pytest.mark.parametrize(("version", "word"), [(0, "older"), (7, "newer")])
def test_another_version(version: int, word: str, saved: Path, two_worlds: World):
    file = saved / "funicular.json"
    file.write_text(file.read_text().replace('"version": 1', f'"version": {version}'))
    run = begin(two_worlds)
    with pytest.raises(funicular.UsageError, match=rf"FN-E405.*version {version} .*{word}"):
        funicular.load(saved, run.model, run.opt)
    run.train(1, look=False)


# ---------------------------------------------------------------------- of something else


class Wider(Stack):
    def __init__(self) -> None:
        super().__init__(depth=3)
        self.out = torch.nn.Linear(WIDTH, WIDTH + 1)


OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], str]] = {
    "fewer layers": (lambda: Stack(depth=1), r"unexpected: layers\.1\..* and 5 more"),
    "more layers": (lambda: Stack(depth=5), r"missing: layers\.3\..* and 5 more"),
    "another shape": (Wider, rf"another shape: out\.weight \[{WIDTH}, {WIDTH}\] instead of \[{WIDTH + 1}, {WIDTH}\]"),
    "another model": (build, r"missing: embed\.weight.*unexpected: inp\.bias, inp\.weight"),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model(other: str, two_worlds: World, tmp_path: Path):
    """Everything that differs is listed; nothing is loaded; training goes on."""
    source = begin(two_worlds, lambda: Stack(depth=3))
    source.train(1, look=False)
    funicular.save(source.model, source.opt, tmp_path / "c")
    make, says = OTHERS[other]
    runs = [begin(two_worlds, make) for _ in range(2)]
    for run in runs:
        torch.manual_seed(3)
        run.train(1, look=False)
    with pytest.raises(funicular.UsageError, match=rf"FN-E407.*{says}.*Nothing was loaded"):
        funicular.load(tmp_path / "c", runs[1].model, runs[1].opt)
    match(*(seeded(run) for run in runs))


def test_a_checkpoint_of_another_type(two_worlds: World, tmp_path: Path):
    source = begin(two_worlds, lambda: build(torch.float32))
    funicular.save(source.model, source.opt, tmp_path / "c")
    run = begin(two_worlds)
    with pytest.raises(
        funicular.UsageError, match=r"FN-E407.*another type: embed\.weight F32 instead of BF16.* and 32 more"
    ):
        funicular.load(tmp_path / "c", run.model, run.opt)
    run.train(1, look=False)


def test_another_optimizer(two_worlds: World, tmp_path: Path):
    run = begin(two_worlds, Stack)
    run.train(1, look=False)
    funicular.save(run.model, run.opt, tmp_path / "c")
    funicular.save(run.model, None, tmp_path / "weights")
    params = list(run.model.parameters())
    two = funicular.AdamW([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*another optimizer.*1 groups"):
        funicular.load(tmp_path / "c", run.model, two)
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*missing.*inp\.weight|FN-E407.*unexpected"):
        funicular.load(tmp_path / "c", run.model, funicular.AdamW(params[1:]))
    with pytest.raises(funicular.UsageError, match=r"FN-E407.*no optimizer"):
        funicular.load(tmp_path / "weights", run.model, run.opt)
    funicular.load(tmp_path / "weights", run.model)
    run.train(1, look=False)


def test_what_cannot_be_saved(host_world: World, tmp_path: Path):
    """Named before anything is written."""
    run = begin(host_world, Stack)
    run.train(1, look=False)
    params = list(run.model.parameters())
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    run.model(run.data(4, WIDTH)).mean().backward()
    sgd.step()
    run.opt.zero_grad()
    stranger = funicular.AdamW([*params, torch.nn.Parameter(torch.ones(3))])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"opt": sgd}, "states of SGD"),
        ({"opt": stranger}, r"shape \(3,\) that is not one of the model's"),
        ({"extra": {"t": torch.ones(1)}}, r"extra\['t'\] is a Tensor"),
        ({"extra": {frozenset(): 2}}, "extra: a key is a frozenset"),
        ({"extra": object()}, "extra is a object"),
        ({"weights": "int8"}, "int8"),
        *(({"keep": value}, f"keep={value!r}.*whole number") for value in (0, -1, 1.5, "3")),
        *(({"shard_bytes": value}, f"shard_bytes={value!r}.*whole number") for value in (0, -1, 5e9, "5GB")),
    ]
    for more, says in cases:
        with pytest.raises(funicular.UsageError, match=f"FN-E408.*{says}"):
            funicular.save(**{"model": run.model, "opt": run.opt, "path": tmp_path / "c", **more})
    run.model.get_extra_state = lambda: None
    assert os.listdir(tmp_path) == []
    run.train(1, look=False)


@pytest.mark.parametrize("name", ["..", "nul\0byte", "dangling/below"])
def test_paths_at_which_nothing_can_be(name: str, tmp_path: Path):
    """The path is what is wrong, not the disk."""
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(funicular.StorageError, match=r"FN-E403.*Save to another path"):
        funicular.save(torch.nn.Linear(2, 2), None, tmp_path / name)
    assert os.listdir(tmp_path) == ["dangling"]


# ---------------------------------------------------------------------- disks


def test_the_path_is_taken(host_world: World, tmp_path: Path):
    """Files, and directories that are no checkpoint, are never replaced, asked or not."""
    run = begin(host_world, Stack)
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "thesis").write_text("years of work")
    for name in ("file", "dir", "file/below"):
        for overwrite in (False, True):
            with pytest.raises(funicular.Error, match=r"FN-E40[23]"):
                funicular.save(run.model, run.opt, tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "file").read_text() == (tmp_path / "dir" / "thesis").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["dir", "file"]


@pytest.mark.parametrize("fault", ["write:eio@1x100000", "write:eio@3x100000", "write:enospc@2x100000"])
@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_writes_fail(fault: str, engine: str, disk: str, io_uring: bool, tmp_path: Path):
    """The checkpoint before stays whole, nothing half-made is left, and training goes on with the same bits."""
    if engine == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    world = World(DEVICE, (disk,), engine=engine)
    good = begin(world)
    good.train(1, look=False)
    funicular.save(good.model, good.opt, tmp_path / "c")
    expected = seeded(good)
    run = begin(world, debug={"faults": fault})
    torch.manual_seed(20240611)
    funicular.load(tmp_path / "c", run.model, run.opt)
    code = "FN-E401" if "enospc" in fault else "FN-E403"
    for overwrite in (False, True):
        with pytest.raises(funicular.StorageError, match=rf"{code}.*\.safetensors") as info:
            funicular.save(
                run.model, run.opt, tmp_path / ("c" if overwrite else "d"), shard_bytes=40_000, overwrite=overwrite
            )
        assert info.value.errno == (28 if "enospc" in fault else 5)
    assert os.listdir(tmp_path) == ["c"]
    match(expected, seeded(run))
    again = begin(world)
    assert funicular.load(tmp_path / "c", again.model, again.opt).step == 1


def test_reads_fail(host_world: World, saved: Path):
    """A disk that cannot be read, found out before anything is lost, or said to be half a load."""
    run = begin(host_world, debug={"faults": f"read:eio@1x{FOREVER}"})
    with pytest.raises(funicular.StorageError, match=r"FN-E406.*Input/output error") as info:
        funicular.load(saved, run.model, run.opt)
    assert info.value.errno == 5
    with pytest.raises(funicular.RuntimeFailure, match="FN-E410"):
        run.train(1)


FULL = """
    from models import Block
    from test_checkpoint import begin
    run = begin(world, lambda: Stack(lambda: Block(256), width=256))
    out = {out!r}
    run.train(1, look=False)
    funicular.save(run.model, run.opt, out + "/first")
    filler = open(out + "/filler", "wb")
    try:
        while True:
            filler.write(bytes(1 << 20)); filler.flush()
    except OSError:
        pass
    for wait in (True, False):
        try:
            funicular.save(run.model, run.opt, out + "/second", wait=wait).wait()
        except funicular.StorageError as error:
            print(error.code, error.errno, error)
    run.train(1, look=False)
    filler.close()
    os.remove(out + "/filler")
    funicular.save(run.model, run.opt, out + "/second")
    print(sorted(set(os.listdir(out)) - {{"lost+found"}}), funicular.load(out + "/first", run.model, run.opt).step)
"""


def test_a_disk_that_is_full(disk: str, tmp_path: Path):
    """A real one: what is needed and what is free is said before anything is written; with space again it works."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    image, out = tmp_path / "image", tmp_path / "out"
    out.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount = f"mount -t ext4 -o loop {image} {out}"
    first, second, end = children.behind(mount, FULL.format(out=str(out)), disk, PLACEMENTS["host"], DEVICE)
    for line in (first, second):
        assert line.startswith("FN-E401 28 "), line
        assert "needs" in line
        assert "MiB" in line
        assert "free" in line
        assert "nothing was written" in line
    assert end == "['first', 'second'] 1"


REFUSED = """
    from test_checkpoint import begin
    run = begin(world, Stack)
    run.train(1, look=False)
    {before}
    for wait in (True, False):
        try:
            funicular.save(run.model, run.opt, {out!r} + "/c", wait=wait).wait()
        except funicular.StorageError as error:
            print(error.code, error.errno, error)
    run.train(1, look=False)
    print(os.listdir({out!r}))
"""


def test_a_read_only_disk(disk: str, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    mount = f"mount --bind {out} {out} && mount -o remount,bind,ro {out}"
    *lines, end = children.behind(mount, REFUSED.format(out=str(out), before=""), disk, PLACEMENTS["host"], DEVICE)
    assert len(lines) == 2
    assert all(line.startswith("FN-E403 30 ") and str(out) in line and "Read-only" in line for line in lines)
    assert end == "[]"


def test_a_directory_of_somebody_else(disk: str):
    """Root may write anywhere, so the child becomes the user ``nobody`` first."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    out = Path(disk) / "out"
    out.mkdir(mode=0o755)
    Path(disk).chmod(0o755)
    body = REFUSED.format(out=str(out), before="os.setgid(65534); os.setuid(65534)")
    *lines, end = children.succeed(body, disk, PLACEMENTS["host"], DEVICE)
    assert len(lines) == 2
    assert all(line.startswith("FN-E403 13 ") and str(out) in line and "denied" in line for line in lines)
    assert end == "[]"


def test_killed():
    """Six processes killed amid saves; ``make soak`` kills two hundred."""
    if DEVICE != "host":
        pytest.skip("forks before the device is used; the same code runs on the host")
    here = str(children.HERE)
    code = f"import sys; sys.path[:0] = [{here!r}]; from kill_saves import campaign; print(campaign(6, 3))"
    status, out, err = children.finish(children.program(code + "; import forks; forks.end()"))
    assert status == 0, err
    assert out.startswith("6 kills: ")


MEMORY = """
    import gc
    from models import Block
    width, depth = 1024, 8
    def step(model, opt):
        model(torch.ones(2, width)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    # What torch needs for itself is there before: code, pools, threads.
    warm = Block(width)
    opt = funicular.AdamW(warm.parameters())
    step(warm, opt)
    del warm, opt
    gc.collect()
    model = Stack(lambda: Block(width), depth, width=width)
    policy = world.policy(model, budget={{"host": "900MiB", "nvme": "2GiB"}}, debug={{"poison": False}})
    with open({group!r} + "/cgroup.procs", "w") as file:
        file.write(str(os.getpid()))
    funicular.offload(model, policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-3)
    step(model, opt)
    used = funicular.stats(model).budgets["host"].used + funicular.stats(model).budgets["hbm"].used
    # Gradients of blocks that compute or are on their way down. How much of all that was touched by now depends on the machine.
    beside = 5 * sum(4 * p.numel() for p in model.layers[0].parameters())
    open({group!r} + "/memory.limit_in_bytes", "w").write(str(used + used // 20 + beside))
    for k in range(2):
        handle = funicular.save(model, opt, {out!r} + f"/c{{k}}", wait=k == 0)
        step(model, opt)
        handle.wait()
        funicular.load({out!r} + f"/c{{k}}", model, opt)
    step(model, opt)
    peak = int(open({group!r} + "/memory.max_usage_in_bytes").read())
    print("survived", used >> 20, peak >> 20)
"""


def test_within_a_container(disk: str):
    """A memory cgroup with 5 % above the plan, and room for gradients on their way: saves and loads survive."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"funicular-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    out = Path(disk) / "out"
    out.mkdir()
    try:
        # Not a fork: it would have copies of its parent's pages made, and the group would count them.
        body = MEMORY.format(group=str(group), out=str(out))
        line = children.succeed(body, disk, PLACEMENTS["host"], "host", prefix=children.EXACT)[0]
    finally:
        facts.eventually(lambda: not (group / "cgroup.procs").read_text().strip())
        group.rmdir()
    assert line.startswith("survived")
    assert int(line.split()[1]) > 175
