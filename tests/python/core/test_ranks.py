"""Ranks in processes of their own, by the calls of the core alone: what they share, and what is said of one that is killed."""

from __future__ import annotations

import random
import signal
import time
import uuid
from collections.abc import Iterator
from subprocess import PIPE, Popen

import pytest

import forks
from children import PATIENCE

RANK = """
import ctypes, os, socket, sys, time
from funicular import _core
name, rank, size, how = {name!r}, {rank}, {size}, {how!r}
COUNT, UNITS = 3 * 8192 + 5, 4
units = [(f"unit {{u}}", [_core.Param(f"{{u}}.w", COUNT, "float32", 4, True)]) for u in range(UNITS)]
policy = '{{"device": "host", "budget": {{"host": "64MiB", "hbm": "256KiB", "threads": 1}}}}'
if rank == 0:
    engine = _core.Engine(units, policy, 0, _core.Ranks(0, size, None, None))
    door = socket.socket(socket.AF_UNIX)
    door.bind("\\0" + name)
    door.listen()
    for _ in range(size - 1):
        with door.accept()[0] as guest:
            socket.send_fds(guest, [_core.resolved_policy(engine).encode()], [_core.shared_fd(engine)])
else:
    guest = socket.socket(socket.AF_UNIX)
    while guest.connect_ex("\\0" + name):
        time.sleep(0.01)
    policy, files, *_ = socket.recv_fds(guest, 1 << 20, 1)
    engine = _core.Engine(units, policy.decode(), 0, _core.Ranks(rank, size, files[0], None))
    os.close(files[0])
owned = [_core.owned(engine, u, rank) for u in range(UNITS)]
sent = [(ctypes.c_float * COUNT)(*([1.0 + rank] * COUNT)) for u in range(UNITS)]
def end(place):
    if how == place:
        os.kill(os.getpid(), 9)
def train(number):
    for u in reversed(range(UNITS)):
        _core.tell_ranks(engine, f"backward of unit {{u}}")
        _core.post_gradients(engine, u, number, bytes([number % 256]))
        end("posted")
        assert _core.wait_posted(engine, u, number) == [bytes([number % 256])] * size
        for section, start, count in owned[u]:
            if count:
                engine.gradient(u, 4 * start, ctypes.addressof(sent[u]), 4 * count, 0)
        end("sending")
        _core.gradients_sent(engine, u, number)
    _core.wait_gradients_landed(engine, number)
    end("landed")
    assert _core.at_step(engine, number) is None
    end("at its step")
    spans = [_core.Span(0, 0, COUNT, 0, number == 1)]
    hyper = _core.Hyper(0.1, 0.9, 0.99, 1e-8, 0.0, number, False, None)
    engine.update([_core.UnitUpdate(u, spans, False) for u in range(UNITS)], [hyper], [], 0, False)
    end("stepping")
def moments():
    engine.settle_all()
    found = (ctypes.c_float * COUNT)()
    for u in range(UNITS):
        engine.read_state(u, 0, "exp_avg", 0, COUNT, ctypes.addressof(found))
        for owner in range(size):
            for section, start, count in _core.owned(engine, u, owner):
                yield from ((owner, value) for value in found[start : start + count])
try:
    _core.meet(engine, "the start")
    print("started", flush=True)
    end("started")
    train(1)
    assert all(abs(value - 0.1 * (1 + owner)) < 1e-6 for owner, value in moments())
    _core.meet(engine, "the middle")
    for number in range(2, {steps}):
        train(number)
    engine.settle_all()
    _core.meet(engine, "the end")
    engine.close()
    print("ended", flush=True)
except Exception as error:
    print(type(error).__name__, error, flush=True)
"""

Ranks = list["Popen[str]"]


@pytest.fixture
def start() -> Iterator:
    """Starts ranks; those that are left at the end are killed."""
    begun: Ranks = []

    def begin(size: int, steps: int, ends: dict[int, str] | None = None) -> Ranks:
        name = f"funicular-test-{uuid.uuid4()}"
        for rank in range(size):
            how = (ends or {}).get(rank, "")
            code = RANK.format(name=name, rank=rank, size=size, how=how, steps=steps)
            begun.append(forks.python(code, stdout=PIPE, stderr=PIPE, text=True))
        return begun

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def said(process: Popen[str]) -> str:
    out, err = process.communicate(timeout=PATIENCE)
    return out + err


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_several_processes_make_each_others_parts(start, size: int):
    ranks = start(size, 5)
    assert [said(rank) for rank in ranks] == ["started\nended\n"] * size


@pytest.mark.parametrize("place", ["started", "posted", "sending", "landed", "at its step", "stepping"])
def test_a_rank_that_is_killed_is_named_by_all_others(start, place: str):
    victim = len(place) % 3
    ranks = start(3, 1000, {victim: place})
    words = [said(rank) for rank in ranks]
    assert ranks[victim].returncode == -signal.SIGKILL
    for rank in {0, 1, 2} - {victim}:
        assert (
            f"RuntimeFailure FN-E701 rank {victim} (process {ranks[victim].pid}) ended without closing" in words[rank]
        )


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_at_any_moment_ends_all_waits(start, seed: int):
    chance = random.Random(seed)
    ranks = start(3, 10**6)
    victim = chance.randrange(3)
    started = [rank.stdout.readline() for rank in ranks]
    assert started == ["started\n"] * 3
    time.sleep(chance.random())
    ranks[victim].kill()
    for rank in {0, 1, 2} - {victim}:
        assert f"FN-E701 rank {victim} (process {ranks[victim].pid})" in said(ranks[rank])
