"""Several processes at one place: savers, sweeps and readers; and what the user has beside, or in, a checkpoint."""

import logging
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import begin
from test_checkpoint_cli import bad_bit
from torch import nn

import children
import funicular
import saves_beside
from conftest import DEVICE, PLACEMENTS
from models import Stack
from mutations import wrap
from twin import World


def small(value: float = 0.0) -> nn.Module:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return model


# ---------------------------------------------------------------------- what is not ours

MANIFESTS = {
    "a policy": '{"version": 1}',
    "nothing": "",
    "no JSON": "x",
    "another format": '{"format": "x", "version": 1}',
}


@pytest.mark.parametrize("what", [*MANIFESTS, "a link", "a pipe", "a directory"])
def test_only_a_valid_manifest_proves_a_checkpoint(what: str, tmp_path: Path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.py").write_text("years")
    manifest = work / "funicular.json"
    if what == "a link":
        funicular.save(small(), None, tmp_path / "c")
        manifest.symlink_to(tmp_path / "c" / "funicular.json")
    elif what == "a pipe":
        os.mkfifo(manifest)
    elif what == "a directory":
        manifest.mkdir()
    else:
        manifest.write_text(MANIFESTS[what])
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(funicular.UsageError, match="FN-E402.*is no checkpoint"):
        funicular.save(small(), None, work, overwrite=True)
    assert (work / "thesis.py").read_text() == "years"
    assert sorted(os.listdir(work)) == ["funicular.json", "thesis.py"]
    assert sorted(os.listdir(tmp_path)) == before


def test_files_of_the_user_in_a_checkpoint_stay(tmp_path: Path):
    for step in range(3):
        funicular.save(small(step), None, tmp_path / "last", overwrite=True)
        if step == 0:
            (tmp_path / "last" / "tokenizer.json").write_text("{}")
            (tmp_path / "last" / "logs").mkdir()
            (tmp_path / "last" / "logs" / "a").write_text("a")
    assert (tmp_path / "last" / "logs" / "a").read_text() == "a"
    assert sorted(os.listdir(tmp_path / "last")) == ["funicular.json", "logs", "model.safetensors", "tokenizer.json"]
    assert os.listdir(tmp_path) == ["last"]
    for step in range(3):
        funicular.save(small(step), None, tmp_path / f"s{step}", keep=1)
        (tmp_path / f"s{step}" / "notes.txt").write_text("years")
    assert sorted(os.listdir(tmp_path)) == ["last", "s0", "s1", "s2"]
    assert os.listdir(tmp_path / "s0") == ["notes.txt"]


def test_directories_of_the_user_on_a_disk_stay(disk: str):
    for name in ("funicular-corpus", "funicular-checkpoints", f"funicular-host-{os.getpid()}-0123456789abcdef"):
        (Path(disk) / name).mkdir()
    (Path(disk) / "funicular-corpus" / "owner").write_text("me")
    (Path(disk) / "funicular-corpus" / "data-0.bin").write_text("mine")
    (Path(disk) / f"funicular-host-{os.getpid()}-0123456789abcdef" / "owner").write_text("me")
    before = sorted(os.listdir(disk))
    run = begin(World(DEVICE, (disk,), **PLACEMENTS["nvme-threads"]), Stack)
    run.train(1, look=False)
    funicular.unwrap(run.model)
    assert sorted(os.listdir(disk)) == before
    assert len(os.listdir(Path(disk) / "funicular-corpus")) == 2


# ---------------------------------------------------------------------- keep


def test_the_highest_steps_are_kept_whatever_the_clock_says(host_world: World, tmp_path: Path):
    run = begin(host_world, Stack)
    for step in range(1, 5):
        run.train(1, look=False)
        funicular.save(run.model, run.opt, tmp_path / f"step-{step}", keep=2 if step == 4 else None)
        if step == 1:
            make_newer(tmp_path / "step-1")
    assert sorted(os.listdir(tmp_path)) == ["step-3", "step-4"]


def make_newer(path: Path) -> None:
    """As if it had been saved before the clock went back."""
    from test_checkpoint_untrusted import forge

    forge(path, lambda said: said.update(created=2**62))


def test_another_sweeps_checkpoints_are_not_counted(tmp_path: Path):
    for name in ("lr1-step1", "lr1-step2", "lr2-step1", "best", "lr2-step2", "lr2-step10"):
        funicular.save(small(), None, tmp_path / name, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["best", "lr1-step1", "lr1-step2", "lr2-step10", "lr2-step2"]


# ---------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_savers_sweeps_and_readers(tmp_path: Path):
    """`make soak` does more of it."""
    reads, seen = saves_beside.campaign(tmp_path, 25)
    assert reads > 2
    assert seen > 1


def test_a_load_waits_for_the_save_before_it(host_world: World, tmp_path: Path):
    """Not the state that was there before, which another call has replaced already as far as this process knows."""
    run = begin(host_world, Stack, debug={"faults": "write:delay=100ms@1x1000000000"})
    funicular.save(run.model, run.opt, tmp_path / "c", extra=1)
    handle = funicular.save(run.model, run.opt, tmp_path / "c", extra=2, wait=False, overwrite=True)
    assert not handle.done()
    assert funicular.load(tmp_path / "c", run.model, run.opt).extra == 2
    handle.wait()


def test_a_load_after_a_save_that_failed_says_so(host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = begin(host_world, Stack)
    funicular.save(run.model, run.opt, tmp_path / "c", extra=1)
    bad = begin(host_world, Stack, debug={"faults": "write:eio@1x1000000"})
    handle = funicular.save(bad.model, bad.opt, tmp_path / "c", extra=2, wait=False, overwrite=True)
    with caplog.at_level(logging.WARNING, "funicular"):
        assert funicular.load(tmp_path / "c", run.model, run.opt).extra == 1
    assert "FN-W404" in caplog.text
    with pytest.raises(funicular.StorageError, match="FN-E403"):
        handle.wait()


# ---------------------------------------------------------------------- half a load of a model that is not offloaded


def large() -> tuple[nn.Module, torch.optim.Optimizer]:
    """More than goes through one buffer."""
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(20)])
    return model, torch.optim.AdamW(model.parameters())


def test_damage_changes_nothing_of_a_model_that_is_not_offloaded(tmp_path: Path):
    model, opt = large()
    funicular.save(model, opt, tmp_path / "c")
    bad_bit(tmp_path / "c" / "model.safetensors", -1)
    other, fresh = large()
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(funicular.StorageError, match="FN-E406"):
        funicular.load(tmp_path / "c", other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    other(torch.ones(1, 1024)).sum().backward()
    fresh.step()


def test_half_a_load_of_a_model_that_is_not_offloaded_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that fails after everything was compared, or Ctrl-C."""
    model, opt = large()
    funicular.save(model, opt, tmp_path / "c", extra=1)
    calls = []

    def cut_off(fill: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def second(self: Any, batch: Any) -> None:
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            fill(self, batch)

        return second

    wrap(monkeypatch, "funicular.checkpoint.restore.Loader._fill", cut_off)
    with pytest.raises(KeyboardInterrupt):
        funicular.load(tmp_path / "c", model, opt)
    uses: list[Any] = [
        lambda: model(torch.ones(1, 1024)),
        lambda: model[3](torch.ones(1, 1024)),
        opt.step,
        lambda: funicular.save(model, opt, tmp_path / "d"),
    ]
    for use in uses:
        with pytest.raises(funicular.RuntimeFailure, match="FN-E410.*failed halfway"):
            use()
    assert funicular.load(tmp_path / "c", model, opt).extra == 1
    model(torch.ones(1, 1024)).sum().backward()
    opt.step()
    assert not model._forward_pre_hooks


# ---------------------------------------------------------------------- limits


def limited(body: str, *, prefix: tuple[str, ...] = ()) -> list[str]:
    head = (
        "import os, resource, sys, warnings, torch, funicular\nfrom torch import nn\nwarnings.simplefilter('ignore')\n"
    )
    status, out, err = children.finish(children.program(head + textwrap.dedent(body), prefix=prefix))
    assert status == 0, err
    return out.splitlines()


def test_too_many_open_files(tmp_path: Path):
    """At any number of files that may still be opened: an error that says what to raise, and nothing left behind."""
    lines = limited(f"""
        model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
        base = {str(tmp_path)!r}
        funicular.save(model, None, base + "/whole", shard_bytes=100)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        for more in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
            said = []
            for act in (
                lambda: funicular.save(model, None, base + f"/c{{more}}", shard_bytes=100),
                lambda: funicular.load(base + "/whole", model),
            ):
                try:
                    act()
                except funicular.Error as error:
                    said.append(str(error))
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for text in said:
                print(text.replace(chr(10), " "))
        print([name for name in os.listdir(base) if name.startswith(".")], len(os.listdir(base)) > 1)
    """)
    assert lines[-1] == "[] True"
    assert len(lines) > 5
    assert sum("ulimit -n" in line for line in lines[:-1]) > len(lines) // 2, lines


def test_a_file_that_is_too_large(tmp_path: Path):
    line, left = limited(f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            funicular.save(nn.Linear(256, 256), None, {str(tmp_path / "c")!r})
        except funicular.StorageError as error:
            print(error)
        print(os.listdir({str(tmp_path)!r}))
    """)
    assert line.startswith("FN-E403")
    assert "shard_bytes" in line
    assert "ulimit -f" in line
    assert "Free space" not in line
    assert left == "[]"


def test_a_file_system_that_takes_no_more_files(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    for inodes in (1, 2, 3):
        mount = f"mount -t tmpfs -o size=64m,nr_inodes={inodes} none {out}"
        body = f"""
            from torch import nn
            try:
                funicular.save(nn.Linear(8, 8), None, {str(out / "c")!r})
                print("saved")
            except funicular.StorageError as error:
                print(error)
            print(os.listdir({str(out)!r}))
        """
        line, left = children.behind(mount, body, str(tmp_path), PLACEMENTS["host"], DEVICE)
        assert line.startswith("FN-E401"), line
        assert "df -i" in line
        assert left == "[]"
