"""What a run tells about itself: counters, the printed summary, log lines, traces."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import children
import facts
import funicular
from funicular import Stats, StepTime
from models import WIDTH, Decoder, Stack, stack
from twin import Run, World, compare

pytestmark = pytest.mark.io_engines

LINKS = {"host_to_device", "device_to_host", "nvme_read", "nvme_write", "cpu_update", "gpu_update"}
CAUSES = {"update", "nvme_read", "nvme_write", "copy", "grads"}


def trained(world: World, steps: int = 3, build=Decoder, **sections: Any) -> Run:
    run = Run(world, True)
    run.model = run.wrap(build(), **sections)
    run.opt = run.adamw()
    run.train(steps, look=False)
    return run


def test_fields(world: World):
    """Names, types, and what must be true of any run."""
    run = trained(world)
    stats = funicular.stats(run.model)
    assert isinstance(stats, Stats)
    assert set(stats.links) == LINKS
    assert set(stats.stalls) == CAUSES
    assert set(stats.budgets) == {"hbm", "host", "nvme"}
    assert stats.device == ("host" if world.device == "host" else f"cuda:{torch.cuda.current_device()}")
    assert stats.engine == (world.engine if world.params == "nvme" else None)
    assert stats.steps == 3
    assert stats.threads >= 1
    assert all(link.bytes >= 0 and 0 <= link.seconds <= stats.seconds for link in stats.links.values())
    assert all(seconds >= 0 for seconds in stats.stalls.values())
    assert stats.stall_seconds == pytest.approx(sum(stats.stalls.values()))
    assert stats.binding in {"compute", *LINKS}
    for name, budget in stats.budgets.items():
        assert 0 <= budget.used <= budget.peak, name
        assert budget.limit is None or budget.peak <= budget.limit, name
    nvme = {stats.links["nvme_read"].bytes > 0, stats.links["nvme_write"].bytes > 0, stats.budgets["nvme"].used > 0}
    assert nvme == {world.params == "nvme"}


def test_a_snapshot(host_world: World):
    """It does not change, and later ones never count backwards."""
    run = trained(host_world)
    first = funicular.stats(run.model)
    kept = dataclasses.asdict(first)
    run.train(2, look=False)
    second = funicular.stats(run.model)
    assert dataclasses.asdict(first) == kept
    assert second.steps == 5
    assert all(second.links[name].bytes >= first.links[name].bytes for name in LINKS)
    assert second.links["host_to_device"].bytes > first.links["host_to_device"].bytes
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.steps = 0


def test_gradients_go_down_once(host_world: World):
    """Bytes are exact: every gradient of every step once, also where gradients are accumulated in place."""
    run = trained(host_world, steps=0)
    total = sum(p.numel() * p.element_size() for p in run.model.parameters())
    for _ in range(3):
        for _ in range(2):
            run.model(run.tokens(2, 9)).backward()
        run.opt.step()
        run.opt.zero_grad()
    for p in run.model.parameters():
        p.detach().sum()
    assert funicular.stats(run.model).links["device_to_host"].bytes == 3 * total


@pytest.mark.parametrize("spare", ["0B", "32MiB"], ids=["", "ahead"])
def test_updates_count_their_traffic(host_world: World, spare: str):
    """28 bytes per fp32 parameter, and its own bytes twice where a read needs the home of a parameter that is in its spare place;
    padding counts too."""
    run = Run(host_world, True)
    run.model = run.wrap(Stack(), optimizer={"where": "cpu", "spare": spare})
    run.opt = run.adamw()
    # Nothing is foreseen for the first step; the second leaves parameters in their spare place.
    for _ in range(2):
        run.model(run.data(4, WIDTH)).square().mean().backward()
        facts.rest(0.05)  # the runner may begin with what it foresees
        run.opt.step()
        run.opt.zero_grad()
    for p in run.model.parameters():
        p.detach().sum()
    stats = funicular.stats(run.model)
    sizes = [p.numel() for p in run.model.parameters()]
    padded = sum(sizes) + 128 * len(sizes)
    assert 2 * sum(sizes) <= stats.updated.cpu <= 2 * padded
    copied_home = stats.links["cpu_update"].bytes - 28 * stats.updated.cpu
    assert (stats.ahead.used > 0, stats.ahead.in_vain) == (spare != "0B", 0)
    assert (copied_home > 0) == (spare != "0B")
    # Elements of 4 bytes, read and written.
    assert copied_home % (2 * 4) == 0
    assert copied_home <= 2 * 4 * padded
    assert stats.links["gpu_update"].bytes == 0


def test_everything_fits_nothing_moves(host_world: World):
    """With room for all, a forward without an update before it pages nothing in."""
    run = trained(host_world, frames=64, debug={"poison": False})
    run.model(run.tokens(2, 9))
    before = funicular.stats(run.model)
    with torch.no_grad():
        run.model(run.tokens(2, 9))
    after = funicular.stats(run.model)
    assert after.links["host_to_device"].bytes == before.links["host_to_device"].bytes
    assert after.prefetch.hits > before.prefetch.hits


def test_strays_and_homes_are_counted(host_world: World):
    run = trained(host_world, build=stack(depth=8))
    before = funicular.stats(run.model)
    for p in run.model.parameters():
        p.detach()
    assert funicular.stats(run.model).stray_reads > before.stray_reads
    assert funicular.stats(run.model).home_uses == before.home_uses


def test_printed(world: World):
    """One line per thing that moved, was waited for, or is bounded."""
    text = str(funicular.stats(trained(world).model))
    first, *rest = text.splitlines()
    assert first.startswith("funicular on ")
    assert "3 steps" in first
    names = [line.split()[0] for line in rest]
    for name in ("host_to_device", "device_to_host", "cpu_update", "stalls", "bound", "windows", "hbm", "host", "nvme"):
        assert name in names, text
    assert ("nvme_read" in names) == (world.params == "nvme")
    assert "GB/s" in text
    assert "MiB" in text
    assert "nan" not in text.lower()


def test_printed_before_anything_happened(host_world: World):
    run = trained(host_world, steps=0)
    stats = funicular.stats(run.model)
    assert "0 steps" in str(stats)
    assert "none" in str(stats)
    assert stats.links["device_to_host"].gb_per_s == 0.0


def step_of(compute: float, busy: float = 0.0, **stalls: float) -> StepTime:
    """A step that waits so long, by cause, while everything that moves is busy so long."""
    waited = dict.fromkeys(CAUSES, 0.0) | stalls
    return StepTime(compute + sum(waited.values()), compute, waited, dict.fromkeys(LINKS, busy))


def test_what_binds_is_said_with_its_share_and_what_would_help():
    """A step that computes 93 % of its time is not bound by the disk, and what the disk costs is said."""
    mostly = step_of(0.93, 0.4, nvme_read=0.05, copy=0.02)
    assert mostly.binding == "compute"
    assert mostly.bound == "compute (93 % of the step)"
    assert mostly.advice.startswith(
        "nvme_read twice as fast would save at most 0.0500 s (5 %): another drive in nvme.paths"
    )
    assert next(iter(mostly.gains)) == "compute"
    disk = step_of(0.4, 0.9, nvme_read=0.6)
    assert disk.bound == "nvme_read (60 % of the step waits for it, 40 % is compute)"
    # Half of what the disk is busy, not all that is waited for; compute hides behind the disk.
    assert disk.gains["nvme_read"] == pytest.approx(0.45)
    assert disk.gains["compute"] == pytest.approx(0.1)
    assert step_of(1.0, 0.3).advice == ""
    assert step_of(0.0).bound == "compute (0 % of the step)"


# ------------------------------------------------------------------ traces


def spans(path: Path) -> list[dict[str, Any]]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


def test_trace_of_chosen_steps(world: World, tmp_path: Path):
    """Valid JSON with a track for every stream and link, the update, the training thread and the steps; events name their unit."""
    path = tmp_path / "trace.json"
    run = trained(world, steps=6, build=stack(depth=8), log={"trace": str(path), "trace_steps": [3, 4]})
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    expected = {"steps", "up", "down", "cpu update", "compute"}
    if world.params == "nvme":
        expected |= {"nvme read", "nvme write", "training thread"}
    assert expected <= set(tracks.values())
    assert [e for e in events if e["ph"] == "C"], "no counters"
    found = spans(path)
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in found)
    assert all(re.fullmatch(rf"{e['cat']}( [0-9]+)?", tracks[e["tid"]]) for e in found)
    assert [e["name"] for e in found if e["cat"] == "steps"] == ["step 3", "step 4"]
    units = {name for name, _ in run.model.named_parameters()} | {f"layers.{i}" for i in range(8)}
    for e in found:
        if e["cat"] not in ("training thread", "steps"):
            assert e["name"].split()[-1] in units, e
            assert (e["args"]["bytes"] > 0) == (e["cat"] != "compute"), e
    total = sum(p.numel() * p.element_size() for p in run.model.parameters())
    down = sum(e["args"]["bytes"] for e in found if e["cat"] == "down")
    # The copies of the last backward before, and of this one, may end on either side of the border.
    assert total <= down <= 3 * total


def test_counters_of_tiers(nvme_world: World, tmp_path: Path):
    """What each tier holds, over time."""
    path = tmp_path / "trace.json"
    trained(nvme_world, steps=4, log={"trace": str(path), "trace_steps": [2, 3]})
    counters = {e["name"] for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "C"}
    assert {"hbm", "host", "nvme"} <= {name.split()[0] for name in counters}


def nanos(event: dict[str, Any]) -> tuple[int, int]:
    """When a slice begins and ends as Perfetto has it: products in floating point, cut off to whole nanoseconds."""
    start = int(event["ts"] * 1000.0)
    return start, start + int(event["dur"] * 1000.0)


def test_no_slices_overlap(nvme_world: World, tmp_path: Path):
    """Viewers drop a slice that overlaps another of its thread in part; reads in flight together lie in lanes."""
    path = tmp_path / "trace.json"
    # Each block is its own request, and each read takes its time: several are in flight.
    trained(
        nvme_world,
        steps=4,
        build=stack(depth=8),
        log={"trace": str(path), "trace_steps": [2, 3, 4]},
        debug={"faults": "read:delay=3ms@1x1000000"},
    )
    threads: dict[int, list[tuple[int, int]]] = {}
    for slice_ in spans(path):
        threads.setdefault(slice_["tid"], []).append(nanos(slice_))
    for slices in threads.values():
        slices.sort(key=lambda times: (times[0], -times[1]))
        open_until: list[int] = []
        for start, end in slices:
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1], (start, end, open_until)
            open_until.append(end)
    events = json.loads(path.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert "nvme read 2" in names, "no two reads were in flight at once: this test proves nothing"
    assert len(set(names)) == len(names)


def test_perfetto_drops_nothing(nvme_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The trace processor itself, where it can be had: the package ``perfetto`` fetches it from the network."""
    processor = pytest.importorskip("perfetto.trace_processor")
    path = tmp_path / "trace.json"
    trained(nvme_world, steps=4, build=stack(depth=8), log={"trace": str(path), "trace_steps": [2, 3, 4]})
    monkeypatch.delenv("PYTHONPATH", raising=False)
    try:
        loaded = processor.TraceProcessor(trace=str(path))
    except Exception as error:  # of urllib, subprocess or itself, by version
        pytest.skip(f"no trace processor could be fetched: {error}")
    with loaded:
        slices = next(iter(loaded.query("select count(*) as n from slice")))
        lost = [
            (row.name, row.value)
            for row in loaded.query("select name, value from stats where severity = 'error' and value > 0")
        ]
        tracks = {row.name for row in loaded.query("select name from thread where name is not null")}
    assert lost == []
    assert slices.n == len(spans(path))
    assert {"steps", "compute", "nvme read", "nvme write"} <= tracks


def test_steps_that_never_come(host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The end of a run says so by name, once; what was traced until then is written."""

    def told(steps: list[int], taken: int) -> list[str]:
        caplog.clear()
        run = trained(host_world, steps=taken, log={"trace": str(tmp_path / "t.json"), "trace_steps": steps})
        funicular.unwrap(run.model)
        return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "FN-W308" in r.getMessage()]

    never = told([7, 9], 2)
    assert len(never) == 1
    assert "t.json" in never[0]
    assert "step 7, 9 did not come" in never[0]
    assert "the run ended after step 2" in never[0]
    assert not (tmp_path / "t.json").exists()
    assert "step 3 did not come" in told([1, 2, 3], 2)[0]
    assert [e["name"] for e in spans(tmp_path / "t.json") if e["cat"] == "steps"] == ["step 1", "step 2"]
    assert "names no step" in told([], 1)[0]
    assert told([1, 2], 2) == []


@pytest.mark.parametrize("end", ["", "del model, opt"])
def test_steps_that_never_come_by_exit(tmp_path: Path, end: str):
    """Without ``unwrap``: the model goes, or the program exits. It is on standard error without a logger of the user."""
    program = textwrap.dedent(
        f"""
        import torch, funicular
        model = torch.nn.Linear(8, 8)
        funicular.offload(model, {{"device": "host", "log": {{"trace": "t.json", "trace_steps": [5]}}}})
        opt = funicular.AdamW(model.parameters())
        model(torch.ones(1, 8)).sum().backward()
        opt.step()
        {end}
        """
    )
    status, _, err = children.finish(children.program(program, cwd=tmp_path))
    assert status == 0, err
    assert err.count("FN-W308") == 1
    assert "step 5 did not come; the run ended after step 1" in err


def test_only_the_chosen_steps(host_world: World, tmp_path: Path):
    """Nothing is collected before, and the file is there as soon as the step is over."""
    path = tmp_path / "trace.json"
    run = trained(host_world, steps=1, log={"trace": str(path), "trace_steps": [3]})
    assert not path.exists()
    run.train(1, look=False)
    assert not path.exists()
    run.train(1, look=False)
    assert spans(path)
    written = path.read_text()
    run.train(2, look=False)
    assert path.read_text() == written


def test_tracing_changes_nothing(two_worlds: World, tmp_path: Path):
    """Traced steps give the same bits."""
    log = {"trace": str(tmp_path / "t.json"), "trace_steps": [1, 2, 3], "every": 1}
    compare(two_worlds, Decoder, lambda run: run.train(4), log=log)
    assert spans(tmp_path / "t.json")


def test_trace_on_demand(host_world: World, tmp_path: Path):
    """The engine's own switch, as tools use it: on, off, written."""
    from funicular import testing

    run = trained(host_world)
    engine = testing.inspect(run.model).engine
    engine.trace(True)
    run.train(1, look=False)
    engine.trace(False)
    run.train(1, look=False)
    assert engine.write_trace(str(tmp_path / "a.json")) > 0
    assert spans(tmp_path / "a.json")
    assert engine.write_trace(str(tmp_path / "b.json")) == 0
    with pytest.raises(funicular.StorageError, match=r"FN-E606.*/none/at/all\.json"):
        engine.write_trace("/none/at/all.json")


def test_trace_that_cannot_be_written(host_world: World, tmp_path: Path):
    """Known before anything is touched; a file that is no trace stays as it is."""
    model = Stack()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    thesis, fifo = tmp_path / "thesis.json", tmp_path / "fifo"
    thesis.write_text('{"title": "Everything"}')
    os.mkfifo(fifo)
    (tmp_path / "link").symlink_to(thesis)
    for path in ("/none/at/all.json", thesis, tmp_path / "link", tmp_path, fifo):
        policy = host_world.policy(model, log={"trace": str(path), "trace_steps": [1]})
        with pytest.raises(funicular.StorageError, match="FN-E606"):
            funicular.offload(model, policy)
    for name, p in model.named_parameters():
        assert type(p) is torch.nn.Parameter
        assert (p, p.data_ptr()) == before[name]
    assert thesis.read_text() == '{"title": "Everything"}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link", "thesis.json"]


def test_trace_that_cannot_be_written_any_more(
    host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The steps are taken all the same, each once, and the log says what became of the trace. An earlier trace is replaced."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    log = {"trace": "folder/trace.json", "trace_steps": [2, 4]}
    run = trained(host_world, steps=2, log=log)
    monkeypatch.chdir("/")
    assert spans(tmp_path / "folder" / "trace.json"), "relative to where the program was"
    shutil.rmtree(tmp_path / "folder")
    with caplog.at_level(logging.ERROR, logger="funicular"):
        run.train(4, look=False)
    assert [r.getMessage()[:8] for r in caplog.records if r.levelno == logging.ERROR] == ["FN-E606 "]
    assert funicular.stats(run.model).steps == 6


# ------------------------------------------------------------------ log


def test_log_lines(host_world: World, caplog: pytest.LogCaptureFixture):
    """Every N steps one line with a code, through ``logging``; nothing is printed."""
    with caplog.at_level(logging.INFO, logger="funicular"):
        trained(host_world, steps=4, log={"every": 2})
    lines = [r.getMessage() for r in caplog.records if r.name == "funicular" and "FN-I307" in r.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["FN-I307 step 2", "FN-I307 step 4"]
    assert all("s/step" in line and "= compute" in line and "bound by" in line for line in lines)


def test_silent_by_default(host_world: World, capfd: pytest.CaptureFixture[str]):
    trained(host_world)
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""
