"""Nothing hangs: close, unwrap, exit, fork, signal handlers that use the model, and Ctrl-C, beside each kind of wait.

Each case has ten seconds; one that takes longer ends its process with the stacks of all threads. The lane alone, also on a GPU:
``pytest tests/python/windows/test_nothing_hangs.py``, with ``FUNICULAR_TEST_DEVICE=cuda``.
"""

from __future__ import annotations

import signal

import pytest

import children
import facts
import waits
from conftest import DEVICE, PLACEMENTS


def run(call: str, disk: str, *statuses: int) -> str:
    body = f"import waits, forks\nwaits.{call}\nforks.end()"
    process = children.start(body, disk, PLACEMENTS["host"], DEVICE)
    found, out, err = children.finish(process, 120)
    assert found in (statuses or (0,)), f"{found}\n{out}\n{err[-5000:]}"
    assert "panicked" not in err, err
    return out


@pytest.mark.parametrize("wait", waits.WAITS)
def test_ends_beside_a_wait(wait: str, disk: str):
    """Another thread waits, and the main thread closes, unwraps or forks."""
    out = run(f"beside({wait!r}, disk)", disk)
    assert out.count("over") == len(waits.ENDS)


@pytest.mark.parametrize("wait", waits.LEFT)
def test_exit_beside_a_wait(wait: str, disk: str):
    """The program ends, with its status and without a word, and leaves no file of the runtime."""
    # A daemon thread that is in torch's backward when Python ends aborts the process: plain PyTorch's too.
    aborts = (-signal.SIGABRT,) if wait.startswith("update") else ()
    out = run(f"leave({wait!r}, disk)", disk, 3, *aborts)
    assert out.endswith("leaves\n")
    assert not [name for name in facts.files(disk) if name.startswith("funicular-")]


def test_figures_from_many_threads(disk: str):
    """Beside steps, saves and ``unwrap``, all exact."""
    run("polled(disk)", disk)


def test_what_a_handler_must_not_do(disk: str):
    """Refused by name, and what it struck goes on."""
    run("refusals(disk)", disk)


@pytest.mark.parametrize("wait", waits.HANDLED)
def test_signal_handlers_amid_a_wait(wait: str, disk: str):
    """A handler saves or reads the model; another raises KeyboardInterrupt."""
    run(f"handlers({wait!r}, disk)", disk)
