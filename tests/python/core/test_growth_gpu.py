"""Free memory of a GPU taken and given back: by a run that needs more of it, and for another program."""

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import facts
import funicular
from models import Block, Stack
from twin import Run, compare, match

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9), reason="FN-I308 with this torch"
    ),
]

GIB = 1 << 30
#: 16 blocks of 8.4 M parameters: 0.5 GiB of weights, 1 GiB of states
WIDE, DEPTH = 2048, 16
#: what is left of the card for a run: states fit beside few tokens, and not beside many, which fit without them
LEFT = int(3.5 * GIB)
FEW, MANY = 512, 3072
POLICY = {"budget": {"hbm": None, "host": "8GiB"}, "params": {"tier": "host"}, "optimizer": {"tier": "host"}}


def build() -> nn.Module:
    return Stack(lambda: Block(WIDE), DEPTH, width=WIDE)


@contextlib.contextmanager
def small_card(left: int) -> Iterator[None]:
    """Leave so many bytes of the card."""
    torch.cuda.empty_cache()
    ballast = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del ballast
        torch.cuda.empty_cache()


def steps(run: Run, count: int, tokens: int) -> None:
    for _ in range(count):
        run.step(run.model(run.data(tokens, WIDE)).square().mean(), look=False)


def grown(run: Run):
    return funicular.stats(run.model).grown


def reasons(run: Run) -> set[str]:
    return {move.why for move in grown(run).moves}


def begin(run: Run) -> None:
    """Steps of few tokens until the states are up."""
    run.model = run.wrap(build(), **POLICY)
    run.opt = run.adamw()
    steps(run, 10, FEW)
    if run.offloaded:
        facts.eventually(lambda: grown(run).taken > 0)


def test_more_tokens_amid_a_run(host_world):
    """No error of memory that a run without growth would not have had, and the same bits."""

    def script(run: Run) -> None:
        with small_card(LEFT) if run.offloaded else contextlib.nullcontext():
            begin(run)
            up = grown(run).taken if run.offloaded else 0
            steps(run, 3, MANY)
            steps(run, 3, FEW)
            if run.offloaded:
                assert up > GIB // 2, "the card was too small for the test"
                assert reasons(run) & {"asked", "short"}, "nothing moved down"

    compare(host_world, None, script)


def test_one_large_allocation(host_world):
    """Between two looks at the memory torch's allocator asks for it."""

    def script(run: Run) -> None:
        with small_card(LEFT) if run.offloaded else contextlib.nullcontext():
            begin(run)
            if run.offloaded:
                torch.cuda.empty_cache()  # asks too: then the states move up again
                for _ in range(40):
                    steps(run, 1, FEW)
                facts.eventually(lambda: grown(run).taken > 0)
                free = torch.cuda.mem_get_info()[0]
                before = grown(run).down
                block = torch.empty(free + grown(run).taken // 2, dtype=torch.uint8, device="cuda")
                assert grown(run).down > before
                assert grown(run).taken == 0
                del block
            else:
                steps(run, 40, FEW)
            steps(run, 3, FEW)

    compare(host_world, None, script)


TAKES = """
import sys, time, torch
held = []
for _ in range(int(20e9) // (512 << 20)):
    held.append(torch.empty(512 << 20, dtype=torch.uint8, device="cuda"))
    time.sleep(0.05)
print("has it", flush=True)
sys.stdin.readline()
"""


def test_a_program_that_takes_20_gb_of_the_card(host_world):
    if torch.cuda.mem_get_info()[0] < int(24e9):
        pytest.skip("the card has no 24 GB left")
    paged = Run(host_world, True)
    with small_card(int(20e9) + int(2.2 * GIB)):
        begin(paged)
        assert grown(paged).taken > GIB // 2
        taken = 10
        other = subprocess.Popen(
            [sys.executable, "-c", TAKES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        has = False
        try:
            began = time.monotonic()
            while not has and other.poll() is None and time.monotonic() - began < 120:
                steps(paged, 1, FEW)
                taken += 1
                # Nearly all of it is gone, its context beside its memory: then it has printed, or is about to.
                has = len(grown(paged).moves) > 0 and "short" in reasons(paged) and said(other)
            out, err = other.communicate("\n", timeout=60)
        finally:
            other.kill()
            other.wait()
        assert other.returncode == 0, err
        assert has or "has it" in out, err
        assert "short" in reasons(paged)
        steps(paged, 3, FEW)
    plain = Run(host_world, False)
    plain.model = plain.wrap(build())
    plain.opt = plain.adamw()
    steps(plain, taken + 3, FEW)
    for run in (plain, paged):
        run.record_weights()
    match(plain.notes, paged.notes)


def said(process: subprocess.Popen[str]) -> bool:
    """Whether a process has written a line that is not read yet."""
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0)[0])
