"""What a run of several ranks says about itself: figures that add up, and what was waited for."""

from __future__ import annotations

import html
from typing import Any

import pytest
from test_dashboards import documented
from told_checks import NAP

import several
from funicular import StepTime
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
    """Compute and stalls are the wall's time; within 10 %, as other programs run beside."""
    return abs(step.compute + step.stalled - step.seconds) <= 0.1 * step.seconds


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
    assert max(here.step.stalls, key=lambda one: 0.0 if one == "update" else here.step.stalls[one]) == cause, here
    if cause != "exchange":
        assert other.step.stalls[cause] < here.step.stalls[cause], other


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
