"""Threads, forked children, data loaders, signals."""

import os
import signal
import subprocess
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import children
import funicular
from models import WIDTH, stack
from twin import Run, case, compare

pytestmark = [pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"), pytest.mark.io_engines]


def in_child(work, seconds: float = 30) -> int:
    """Run ``work`` in a forked child; its exit status, or -1 if it did not end."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work() or 0)
        except BaseException as error:
            os._exit(77 if "FN-E103" in str(error) else 1)
    for _ in range(int(seconds * 100)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@case(stack())
def test_fork_that_does_nothing(run: Run):
    for _ in range(3):
        run.train(1, look=False)
        assert in_child(lambda: 0) == 0


@case(stack())
def test_fork_in_the_middle_of_a_step(run: Run):
    for _ in range(2):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        assert in_child(lambda: 0) == 0
        loss.backward()
        assert in_child(lambda: 0) == 0
        run.opt.step()
        run.opt.zero_grad()


@pytest.mark.parametrize("after", ["step", "read"])
def test_fork_that_reads_weights(after, world):
    """A child sees the weights of the moment, or is refused by name; it never hangs, and the parent goes on."""
    if world.device == "cuda":
        pytest.skip("CUDA does not survive fork")

    def script(run: Run) -> None:
        run.train(1, look=False)
        if after == "read":
            run.record_weights()
        weight = run.model.layers[2].up.weight
        expect = weight.detach().clone() if after == "read" else None

        def work():
            got = weight.detach().clone()
            return 0 if expect is None or torch.equal(got, expect) else 3

        assert in_child(work) in (0, 77)
        run.train(2)

    compare(world, stack(), script)


@case(stack())
def test_fork_that_trains_is_refused(run: Run):
    """A child must not touch the parent's frames: error by name, or, on the plain side, success."""
    run.train(1)

    def work():
        torch.manual_seed(0)
        run.model(torch.randn(4, WIDTH)).square().mean().backward()
        run.opt.step()

    if run.world.device == "host":
        assert in_child(work) == (77 if run.offloaded else 0)
    run.train(2)


@case(stack())
def test_data_loader_workers(run: Run):
    data = TensorDataset(torch.randn(12, WIDTH, generator=run.generator))
    for (x,) in DataLoader(data, 4, num_workers=2):
        run.step(run.model(x.to(run.device)).square().mean())


@case(stack())
def test_forward_in_another_thread(run: Run):
    for _ in range(2):
        out = []
        thread = threading.Thread(target=lambda out=out: out.append(run.model(run.data(4, WIDTH))))
        thread.start()
        thread.join()
        run.step(out[0].square().mean())


@case(stack())
def test_backward_in_another_thread(run: Run):
    for _ in range(2):
        loss = run.model(run.data(4, WIDTH)).square().mean()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        run.record_grads()
        run.opt.step()
        run.opt.zero_grad()


@case(stack())
def test_whole_step_in_another_thread(run: Run):
    thread = threading.Thread(target=lambda: run.train(3))
    thread.start()
    thread.join()


@case(stack())
def test_two_threads_evaluate(run: Run):
    """Both are right, whichever thread waits for the other."""
    run.train(1, look=False)
    inputs = [run.data(4, WIDTH) for _ in range(2)]
    results = [[], []]

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                results[i].append(run.model(inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.record("results", results)
    run.train(1)


@case(stack())
def test_another_thread_reads_while_training(run: Run):
    """Reads never see bytes that are neither the weights before nor after a step."""
    stop, errors = threading.Event(), []

    def work():
        while not stop.is_set():
            for p in run.model.parameters():
                # A copy: isfinite compares each element with itself, and a step may come between the two reads.
                if not bool(torch.isfinite(p.detach().clone()).all()):
                    errors.append("not finite")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        run.train(5, look=False)
    finally:
        stop.set()
        thread.join()
    assert not errors


SCRIPT = """
import os, sys, signal, threading, time, torch
sys.path[:0] = {path!r}
import funicular
from models import WIDTH, Stack
from twin import World
model = Stack(depth=8)
world = World({device!r}, ({disk!r},), "nvme", "nvme")
funicular.offload(model, world.policy(model))
opt = funicular.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(4, WIDTH).to(world.torch_device)
def step():
    model(x).square().mean().backward()
    opt.step()
    opt.zero_grad()
step()
{body}
"""


def subprocess_of(body: str, disk: str, device: str) -> tuple[subprocess.Popen, str]:
    code = SCRIPT.format(path=[str(children.HERE)], device=device, disk=disk, body=textwrap.dedent(body))
    return children.program(code, device)


def finish(process: subprocess.Popen, seconds: float = children.PATIENCE) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, out, err


ENDINGS = {
    "exit": ("print('end')", 0),
    "exit with an update under way": ("step(); print('end')", 0),
    "exit with a graph alive": ("loss = model(x).mean(); print('end')", 0),
    "sys.exit in forward": ("model.layers[3].register_forward_pre_hook(lambda *_: sys.exit(5)); step()", 5),
    "os._exit": ("step(); os._exit(6)", 6),
    "unhandled": ("step(); raise ValueError('mine')", 1),
    "daemon thread": (
        "threading.Thread(target=lambda: [step() for _ in range(10**6)], daemon=True).start(); time.sleep(.1)",
        0,
    ),
}


def left_behind(disk: str, *, orderly: bool) -> list[str]:
    """What a dead process left: nothing if it could run its exit handlers, else at most a directory without data, which the
    next run sweeps."""
    left = [path.name for run in Path(disk).iterdir() for path in (run, *run.iterdir())]
    if not orderly:
        kept = [name for name in left if name != "owner" and not name.startswith("funicular-")]
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        policy = {
            "device": "host",
            "nvme": {"paths": [disk]},
            "optimizer": {"tier": "nvme"},
            "budget": {"host": "8MiB"},
        }
        funicular.unwrap(funicular.offload(model, policy))
        return kept + [path.name for path in Path(disk).iterdir()]
    return left


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_process_ends(ending, disk):
    """At every moment the process ends by itself and leaves no file."""
    from conftest import DEVICE

    body, expected = ENDINGS[ending]
    status, _, err = finish(subprocess_of(body, disk, DEVICE))
    # A daemon thread that is in torch's backward when Python ends aborts the process: plain PyTorch's too (12 of 12 on Python 3.11).
    assert status == expected or (ending == "daemon thread" and status == -signal.SIGABRT), err
    assert left_behind(disk, orderly=ending not in {"os._exit"}) == []
    assert "panicked" not in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_signal_while_training(number, disk):
    """Ctrl-C is a KeyboardInterrupt in the loop; the others end the process; no file stays."""
    from conftest import DEVICE

    process = subprocess_of("print('ready', flush=True)\nwhile True: step()", disk, DEVICE)
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    status, _, err = finish(process)
    assert status == -number or (number == signal.SIGINT and status == 1), err
    assert number != signal.SIGINT or "KeyboardInterrupt" in err
    assert left_behind(disk, orderly=number == signal.SIGINT) == []


@pytest.mark.slow
def test_interrupted_and_resumed(disk):
    """Ctrl-C at arbitrary moments, caught by the user's loop, which then goes on."""
    from conftest import DEVICE

    body = """
    hits = 0
    nagger = threading.Thread(target=lambda: [time.sleep(.02) or os.kill(os.getpid(), signal.SIGINT) for _ in range(20)])
    nagger.start()
    over = False
    while not over:
        try:
            while nagger.is_alive():
                try:
                    step()
                except KeyboardInterrupt:
                    hits += 1
                    opt.zero_grad()
            nagger.join()
            over = True
        except KeyboardInterrupt:  # amid these lines, or in zero_grad
            hits += 1
    opt.zero_grad()
    step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    print('hits', hits)
    """
    status, out, err = finish(subprocess_of(body, disk, DEVICE))
    assert status == 0, err
    assert out.startswith("hits")
