"""Ctrl-C, anywhere: no hook and no window stays behind, a step happened or did not, and training goes on with the same bits."""

from __future__ import annotations

import sys

import pytest

import children
import facts
import interrupts
from conftest import DEVICE, PLACEMENTS
from models import CUDA

pytestmark = pytest.mark.io_engines

SCENARIOS = {
    "host": ["forward_and_backward", "step_and_zero_grad"],
    "nvme-threads": ["forward_and_backward", "step_and_zero_grad", "reads", "reads_and_edits", "offload_and_unwrap"],
    "nvme-io_uring": ["reads"],
}


def in_child(call: str, placement: str, disk: str, io_uring: bool) -> str:
    """Run a scenario of a module in a process of its own: what it checks can end a process."""
    if placement == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    body = f"import alarms, forks, interrupts, faulthandler; faulthandler.enable()\nprint({call})\nforks.end()"
    status, out, err = children.finish(children.start(body, disk, PLACEMENTS[placement], DEVICE), 1100)
    assert status == 0, f"status {status}\n{out}\n{err[-3000:]}"
    assert not facts.files(disk)
    return out


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="needs the exception table of Python 3.11 to know where signals can strike"
)
@pytest.mark.parametrize(("placement", "scenario"), [(p, s) for p, scenarios in SCENARIOS.items() for s in scenarios])
def test_at_every_point(placement: str, scenario: str, disk: str, io_uring: bool):
    """At points at which CPython looks at signals, once each; `make soak` takes all of them."""
    # Of a GPU's backward, which runs in a thread of its own, signals strike none.
    assert int(in_child(f"interrupts.{scenario}(world, every=False)", placement, disk, io_uring)) > (
        50 if CUDA else 100
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_real_signals(placement: str, disk: str, io_uring: bool):
    """At random moments, as it really comes."""
    assert int(in_child("interrupts.real_signals(world, 20)", placement, disk, io_uring)) > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("placement", ["host", "nvme-threads"])
def test_several_signals(placement: str, disk: str, io_uring: bool):
    """Ctrl-C again and again, faster than a step notes what it did."""
    assert int(in_child("alarms.several_signals(world, 40)", placement, disk, io_uring)) > 5


@pytest.mark.covering(1, times=2)
@pytest.mark.parametrize("where", ["forward", "backward", "step", "offload"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_process_ends(where: str, placement: str, disk: str, io_uring: bool):
    """Ctrl-C that no handler catches: the process is gone at once, and its directory with it."""
    if placement == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    # How long the closing takes is measured by `make soak`; here a hang is what fails.
    interrupts.process_ends(where, placement, disk, 0.3)
