"""What a run of several ranks says about itself: figures that add up, and what was waited for."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from test_dashboards import documented
from told_checks import NAP

import several
from funicular import StepTime, _core
from twin import World

PEERS = {"peers_grads", "peers_step", "peers_update"}


def test_figures(host_world: World):
    """The rank, bytes of the exchange to the last, and names as the docs list them; a process alone has none of them."""
    for rank, (said, flat, text, page, size, logged) in enumerate(several.run(2, "told_checks:figures", host_world)):
        assert (said.ranks.rank, said.ranks.size) == (rank, 2)
        assert {"exchange", *PEERS} <= set(said.stalls)
        # Of two ranks each sends what the other owns, and receives what it owns itself, in each step.
        assert said.links["exchange"].bytes == 2 * size
        assert 0 < said.ranks.sent < 2 * size
        assert said.links["exchange"].seconds == pytest.approx(said.stalls["exchange"])
        assert said.ranks.waited == pytest.approx(sum(said.stalls[cause] for cause in PEERS))
        assert said.step.busy["exchange"] > 0
        assert set(flat) == documented(ranked=True)
        assert f"rank {rank} of 2" in text
        assert "s in their exchange, waited" in text
        assert 0 < logged["funicular/exchange"] < logged["funicular/stalled"]
        assert logged["funicular/peers"] > 0
        assert page == f'<pre style="line-height: 1.3">{html.escape(text)}</pre>'


def adds_up(step: StepTime) -> bool:
    """Compute and stalls are the wall's time: no wait is counted twice, or not at all. Other programs run beside."""
    return abs(step.compute + step.stalled - step.seconds) < NAP / 2


@pytest.mark.parametrize(
    ("where", "cause"),
    [("backward", "peers_grads"), ("step", "peers_step"), ("update", "peers_update"), ("exchange", "exchange")],
)
def test_what_is_late_is_named(where: str, cause: str, host_world: World):
    """Times add up on both ranks, and go to what was late."""
    here, other = several.run(2, "told_checks:late", host_world, where)
    assert adds_up(here.step), here
    assert adds_up(other.step), other
    # Sleeps never take less than they should: who waits for what sleeps has most of that time.
    assert here.step.stalls[cause] > NAP / 2, here


def step_of(busy: float, **stalls: float) -> StepTime:
    """A step that computes for half a second."""
    known: dict[str, Any] = dict.fromkeys(
        ("update", "nvme_read", "nvme_write", "copy", "grads", "exchange", *PEERS), 0.0
    )
    links = ("host_to_device", "device_to_host", "nvme_read", "nvme_write", "cpu_update", "gpu_update", "exchange")
    return StepTime(0.5 + sum(stalls.values()), 0.5, known | stalls, dict.fromkeys(links, busy))


def test_what_binds_is_said():
    peers = step_of(0.1, peers_step=0.3, peers_grads=0.2)
    assert peers.bound == "peers (50 % of the step waits for it, 50 % is compute)"
    assert peers.advice.startswith("other ranks that are never late would save at most 0.5000 s (50 %): batches that")
    exchange = step_of(0.4, exchange=0.5)
    assert exchange.binding == "exchange"
    assert exchange.advice.startswith("exchange twice as fast would save at most 0.2000 s (20 %): more tokens")


# ------------------------------------------------------------------ traces


def events(path: Path) -> list[dict[str, Any]]:
    """All that a trace holds."""
    return json.loads(path.read_text())["traceEvents"]


def slices(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The slices of each process of a trace, by its name."""
    all_ = events(path)
    names = {e["pid"]: e["args"]["name"] for e in all_ if e["name"] == "process_name"}
    return {name: [e for e in all_ if e["ph"] == "X" and e["pid"] == pid] for pid, name in names.items()}


@pytest.mark.parametrize(("steps", "ended"), [(4, ""), (3, "unwrap")])
def test_one_trace_of_all_ranks(steps: int, ended: str, host_world: World, tmp_path: Path):
    """Each rank has its file and a process in the one of all, with its steps, its exchanges and its waits, by one clock."""
    path = tmp_path / "trace.json"
    said = several.run(2, "told_checks:traced", host_world, str(path), steps, ended)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trace.json", "trace.rank0.json", "trace.rank1.json"]
    assert [[line[:7] for line in lines] for lines in said] == [["FN-I306", "FN-I310"], ["FN-I306"]]
    both = slices(path)
    assert list(both) == ["funicular, rank 0", "funicular, rank 1"]
    for rank, found in enumerate(both.values()):
        own = slices(tmp_path / f"trace.rank{rank}.json")[f"funicular, rank {rank}"]
        assert [(e["name"], e["tid"], e["dur"]) for e in own] == [(e["name"], e["tid"], e["dur"]) for e in found]
        assert [e["name"] for e in found if e["cat"] == "steps"] == ["step 2", "step 3"]
        names = {e["name"].removesuffix(e["name"].split()[-1]).strip() for e in found if e["cat"] == "compute"}
        assert {"exchange", "wait: peers_grads", "forward", "backward"} <= names
        assert any(e["name"] == "wait: peers_step" for e in found)
        assert all(e["args"]["bytes"] > 0 for e in found if e["cat"] == "training thread" and "exchange" in e["name"])
    # None ends an exchange before the other has begun it: so the clocks are one.
    mine, theirs = (
        [e for e in found if e["name"].startswith("exchange ") and e["cat"] == "compute"] for found in both.values()
    )
    assert [e["name"] for e in mine] == [e["name"] for e in theirs]
    assert len(mine) == 2 * 5
    assert all(a["ts"] < b["ts"] + b["dur"] and b["ts"] < a["ts"] + a["dur"] for a, b in zip(mine, theirs, strict=True))
    threads = [(e["pid"], e["tid"]) for e in events(path) if e["name"] == "thread_name"]
    assert len(set(threads)) == len({tid for _, tid in threads}) == len(threads)


def test_traces_that_are_not_merged(host_world: World, tmp_path: Path):
    """It is said why, and with which command; the command says what is missing, and merges what is there."""
    path = tmp_path / "trace.json"
    told, _ = several.run(2, "told_checks:traced", host_world, str(path), 4, "missing")
    assert [line[:7] for line in told] == ["FN-I306", "FN-W309"]
    assert "trace.rank1.json': it cannot be read" in told[1]
    command = told[1].partition("funicular trace merge ")[2].split()
    assert command == [str(tmp_path / "trace.rank0.json"), str(tmp_path / "trace.rank1.json"), "-o", str(path)]
    assert not path.exists()
    # A second rank, a second later.
    first = (tmp_path / "trace.rank0.json").read_text()
    head, rest = first.split("\n", 1)
    of = json.loads(f"{head}]}}")["otherData"]
    later = head.replace('"rank":0', '"rank":1').replace(str(of["began_ns"]), str(of["began_ns"] + 10**9))
    (tmp_path / "trace.rank1.json").write_text(f"{later}\n{rest}")
    assert _core.cli(["funicular", "trace", "merge", *command]) == 0
    found = [e["ts"] for e in events(path) if e["name"] == "step 2"]
    assert found[1] - found[0] == pytest.approx(1e6)
    assert _core.cli(["funicular", "trace", "merge", command[0], "-o", str(path)]) == 1
    missing = str(tmp_path / "trace.rank7.json")
    assert _core.cli(["funicular", "trace", "merge", command[0], missing, "-o", str(path)]) == 2
