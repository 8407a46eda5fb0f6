"""Ctrl-C, anywhere: no hook and no window stays behind, a step happened or did not, and training goes on with the same bits."""

from __future__ import annotations

import select
import signal
import sys
import time

import pytest

import children
import facts
from conftest import DEVICE, PLACEMENTS

SCENARIOS = {
    "host": ["forward_and_backward", "step_and_zero_grad"],
    "nvme-threads": ["forward_and_backward", "step_and_zero_grad", "reads", "reads_and_edits", "offload_and_unwrap"],
    "nvme-io_uring": ["reads"],
}


def in_child(call: str, placement: str, disk: str, io_uring: bool) -> str:
    """Run a scenario in a process of its own: what it checks can end a process."""
    if placement == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    body = f"import interrupts, faulthandler; faulthandler.enable()\nprint(interrupts.{call})"
    status, out, err = children.finish(children.start(body, disk, PLACEMENTS[placement], DEVICE), 280)
    assert status == 0, f"status {status}\n{out}\n{err[-3000:]}"
    assert not facts.files(disk)
    return out


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="needs the exception table of Python 3.11 to know where signals can strike"
)
@pytest.mark.parametrize(("placement", "scenario"), [(p, s) for p, scenarios in SCENARIOS.items() for s in scenarios])
def test_at_every_point(placement: str, scenario: str, disk: str, io_uring: bool):
    """At points at which CPython looks at signals, once each; `make soak` takes all of them."""
    assert int(in_child(f"{scenario}(world, every=False)", placement, disk, io_uring)) > 100


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_real_signals(placement: str, disk: str, io_uring: bool):
    """At random moments, as it really comes."""
    assert int(in_child("real_signals(world, 40)", placement, disk, io_uring)) > 20


@pytest.mark.parametrize("where", ["forward", "backward", "step", "offload"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_process_ends(where: str, placement: str, disk: str, io_uring: bool):
    """Ctrl-C that nobody catches: the process is gone at once, and its directory with it."""
    if placement == "nvme-io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    body = f"""
    import atexit, funicular._ends
    atexit.register(lambda: print("closed", flush=True))
    atexit.register(funicular._ends._close_all)  # before that; again later, for nothing
    where = {where!r}
    model = Stack(depth=200 if where == "offload" else 12)
    def forever(action):
        print("go", flush=True)
        while True: action()
    if where == "offload":
        forever(lambda: funicular.unwrap(funicular.offload(model, world.policy(model))))
    funicular.offload(model, world.policy(model))
    opt = funicular.AdamW(model.parameters())
    x = torch.ones(4, WIDTH).to(world.torch_device)
    loss = model(x).sum()
    if where == "forward": forever(lambda: model(x))
    if where == "backward": forever(lambda: loss.backward(retain_graph=True))
    forever(opt.step)
    """
    process = children.start(body, disk, PLACEMENTS[placement], DEVICE)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    time.sleep(0.3)  # well into it
    process.send_signal(signal.SIGINT)
    # What comes after that is the interpreter's and torch's own end, seconds on a busy machine.
    assert select.select([process.stdout], [], [], 2 if DEVICE == "host" else 10)[0], "not closed in time"
    assert process.stdout.readline() == "closed\n"
    status, _, err = children.finish(process)
    assert status in (1, -signal.SIGINT), err
    assert "KeyboardInterrupt" in err
    assert "panicked" not in err
    assert "Exception ignored" not in err, err
    assert not facts.files(disk)
