"""What takes too long for every day: thousands of steps in which nothing may grow, thousands of short runs with faults, Ctrl-C at
every point. ``python tests/python/soak.py --help``; parts of it are run by the tests, in small.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

import torch

import children
import facts
import funicular
import interrupts
import turns
from conftest import DEVICE, DISK, PLACEMENTS
from models import Decoder, Stack
from twin import Run, World, match

MIB = 1 << 20

# ------------------------------------------------------------------ nothing grows


def figures(disk: str) -> dict[str, int]:
    """What must not grow; memory as the lowest of a few looks."""
    gc.collect()
    return {
        "PSS": min(facts.all_pss() for _ in range(3)),
        "RSS": min(facts.rss() for _ in range(3)),
        "files": facts.open_files(),
        "threads": facts.threads(),
        "disk": facts.disk_use(disk),
    }


def steady(world: World, steps: int, warm: int = 60) -> dict[str, tuple[int, int]]:
    """Train, with looks at weights and states; each figure after the warm-up and at the end. Raises if one grew."""
    run = Run(world, True)
    run.model = run.wrap(Decoder(matmul=True, dropout=0.0))
    run.opt = run.adamw()

    def train(n: int) -> None:
        for i in range(n):
            run.step(run.model(run.tokens(2, 9)), look=i % 10 == 0)
            if i % 10 == 0:
                run.model.norm.weight.detach().sum().item()
                run.opt.state[run.model.norm.weight]["exp_avg"].sum().item()
                with torch.no_grad():
                    run.model(run.tokens(2, 9))
                funicular.stats(run.model)
            run.notes.clear()

    train(warm)
    before, named = figures(world.paths[0]), facts.thread_names()
    train(steps)
    after = figures(world.paths[0])
    for name, budget in funicular.stats(run.model).budgets.items():
        assert budget.limit is None or budget.peak <= budget.limit, name
    for name, allowed in {"PSS": 3 * MIB, "RSS": 3 * MIB, "files": 0, "threads": 0, "disk": 0}.items():
        assert after[name] - before[name] <= allowed, (
            f"{name} grew from {before[name]} to {after[name]} in {steps} steps; new threads: {facts.thread_names() - named}"
        )
    return {name: (before[name], after[name]) for name in before}


# ------------------------------------------------------------------ short runs with faults

RECOVERABLE = [
    "read:short@{n}x{m}",
    "write:short@{n}x{m}",
    "read:eio@{n}",
    "write:eio@{n}",
    "read:delay=2ms@{n}x{k}",
    "write:delay=2ms@{n}x{k}",
]
FATAL = {
    "read:eio@{n}x1000000": {"FN-E301"},
    "write:eio@{n}x1000000": {"FN-E301"},
    "write:enospc@{n}x1000000": {"FN-E301"},
    "read:flip@{n}": {"FN-E302"},
    "read:flip@{n}x1000000": {"FN-E302"},
    "write:lost@{n}x1000000": {"FN-E302"},
    "read:lost@{n}x1000000": {"FN-E302"},
}


class Plan:
    """One short run, all of it from its seed."""

    def __init__(self, seed: int, io_uring: bool) -> None:
        self.chance = random.Random(seed)
        pick = self.chance.choice
        self.placement = {
            "params": pick(["host", "nvme", "nvme"]),
            "optimizer": pick(["host", "nvme", "nvme"]),
            "engine": pick(["threads", "io_uring"] if io_uring else ["threads"]),
        }
        self.depth = self.chance.randint(2, 7)
        self.frames = self.chance.randint(1, self.depth + 2)
        self.dtype = pick([torch.float32, torch.bfloat16])
        self.decoder = pick([True, False])
        self.checkpoint = pick(["none", "none", "reentrant", "non-reentrant"])
        self.poison = pick([True, False])
        self.micro = pick([1, 1, 3])
        self.steps = self.chance.randint(2, 6)
        self.looks = pick([True, False])
        self.fatal = pick([None, None, *FATAL])
        n = int(10 ** self.chance.uniform(0, 2.3))
        faults = [
            f.format(n=self.chance.randint(1, 150), m=self.chance.randint(1, 60), k=5)
            for f in self.chance.sample(RECOVERABLE, self.chance.randint(0, 2))
        ]
        # Tries that fail are repeated a few times: two rules for the same block could use them up.
        if self.fatal:
            faults = [self.fatal.format(n=n)]
        self.sections = {"debug": {"faults": ",".join(faults)}}

    def build(self) -> torch.nn.Module:
        if self.decoder:
            return Decoder(
                ckpt=self.checkpoint, depth=self.depth, dtype=self.dtype, dropout=0.0, tie=self.depth % 2 == 0
            )
        return Stack(depth=self.depth).to(self.dtype)

    def step(self, run: Run) -> None:
        for _ in range(self.micro):
            if self.decoder:
                loss = run.model(run.tokens(2, 9))
            else:
                loss = run.model(run.data(4, run.model.width, dtype=self.dtype)).float().square().mean()
            run.record("loss", loss)
            loss.backward()
        if self.looks:
            run.record_grads()
        run.opt.step()
        run.opt.zero_grad()
        if self.looks:
            run.record_weights()
            p = next(iter(run.model.parameters()))
            run.record("state", run.opt.state[p]["exp_avg"])


def short_run(seed: int, disk: str, io_uring: bool) -> str:
    """Run a plan on both sides: ``exact``, or the code of the error that its fault calls for. Everything else raises."""
    plan = Plan(seed, io_uring)
    world = World(DEVICE, (disk,), **plan.placement, poison=plan.poison)
    plain = Run(world, False)
    plain.model = plain.wrap(plan.build())
    plain.opt = plain.adamw()
    history = [weights(plain)]
    for _ in range(plan.steps):
        plan.step(plain)
        history.append(weights(plain))
    plain.record_weights()
    paged = Run(world, True)
    try:
        paged.model = paged.wrap(plan.build(), plan.frames, **plan.sections)
        paged.opt = paged.adamw()
        for _ in range(plan.steps):
            plan.step(paged)
        paged.record_weights()
        outcome = "exact"
    except funicular.Error as error:
        allowed = FATAL.get(plan.fatal or "", set())
        if error.code not in allowed or not isinstance(error, funicular.StorageError):
            raise
        outcome = error.code
        rescue(paged, world, history)
    if outcome == "exact":
        match(plain.notes, paged.notes)
    else:
        match(plain.notes[: len(paged.notes)], paged.notes) if paged.notes else None
    return outcome


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def rescue(run: Run, world: World, history: list[list[torch.Tensor]]) -> None:
    """What is in host memory can be saved, each element as before or as after a step; what is on disk gives the error again."""
    if run.model is None:
        return
    try:
        try:
            funicular.unwrap(run.model)
        except funicular.StorageError:
            funicular.unwrap(run.model)  # without the states, whose error has been seen
    except funicular.StorageError:
        assert world.params == "nvme"
        return
    for i, p in enumerate(run.model.parameters()):
        right = [p.detach() == step[i] for step in history]
        assert any(bool((a | b).all()) for a, b in itertools.pairwise(right)), f"parameter {i} is of no step"


@contextlib.contextmanager
def no_hang(seconds: int) -> Iterator[None]:
    """End the process, with the stacks of all threads, if the body takes too long."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def short_runs(seeds: range, disk: str, io_uring: bool) -> Counter[str]:
    """Many of them; nothing is left behind by any."""
    outcomes: Counter[str] = Counter()
    short_run(0, disk, io_uring)  # torch's own pools and files
    gc.collect()
    files, threads = facts.open_files(), facts.threads()
    for seed in seeds:
        try:
            with no_hang(120):
                outcomes[short_run(seed, disk, io_uring)] += 1
                facts.forget_backwards()
                for _ in range(4):
                    gc.collect()
                    if not facts.files(disk):
                        break
            assert not facts.files(disk), "files are left"
            assert facts.saved_tensor_hooks() == 0, "hooks are left"
            assert facts.open_files() <= files, "descriptors are left"
            facts.eventually(lambda: facts.threads() <= threads)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return outcomes


# ------------------------------------------------------------------ command line


def has_io_uring(disk: str) -> bool:
    model = Stack(depth=2)
    world = World(DEVICE, (disk,), **PLACEMENTS["nvme-io_uring"])
    try:
        funicular.offload(model, world.policy(model))
    except funicular.Error as error:
        if error.code != "FN-E601":
            raise
        return False
    funicular.unwrap(model)
    return True


def in_child(code: str, placement: str, disk: str, seconds: float) -> None:
    """Run a statement in a process of its own, with ``world`` set; prints what it prints."""
    status, out, err = children.finish(children.start(code, disk, PLACEMENTS[placement], DEVICE), seconds)
    assert status == 0, f"status {status}\n{out}\n{err}"
    print(out.strip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps in which nothing may grow, per placement (2000)")
    parser.add_argument("--runs", type=int, default=3000, help="short runs with faults (3000)")
    parser.add_argument("--turns", type=int, default=300, help="random programs over units with spare frames (300)")
    parser.add_argument("--seed", type=int, default=1, help="first seed of the short runs (1)")
    parser.add_argument(
        "--signals", type=int, default=1000, help="real signals at random moments, per placement (1000)"
    )
    parser.add_argument("--ends", type=int, default=25, help="processes ended by Ctrl-C, per placement and place (25)")
    parser.add_argument("--skip-points", action="store_true", help="leave out Ctrl-C at every point of the package")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    disk = tempfile.mkdtemp(prefix="funicular-soak-", dir=DISK)
    ring = has_io_uring(disk)
    placements = [name for name in PLACEMENTS if ring or name != "nvme-io_uring"]
    for name in placements if options.steps else ():
        in_child(
            f"""
            import soak
            for what, (a, b) in soak.steady(world, {options.steps}).items():
                unit = 1 if what in ("files", "threads") else 2**20
                print(f"{name:14} {{what:8}} {{a / unit:10.2f}} -> {{b / unit:10.2f}}{{'' if unit == 1 else ' MiB'}} in {options.steps} steps")
            """,
            name,
            disk,
            60 + options.steps,
        )
    if options.runs:
        outcomes = short_runs(range(options.seed, options.seed + options.runs), disk, ring)
        print("short runs     " + ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())), flush=True)
    for seed in range(options.seed, options.seed + options.turns):
        with tempfile.TemporaryDirectory(dir=disk) as folder, no_hang(120):
            try:
                turns.one(World(DEVICE, (disk,), **PLACEMENTS["host"]), seed, Path(folder))
            except Exception as error:
                raise AssertionError(f"turns of seed {seed}: {error}") from error
            gc.collect()
    if options.turns:
        print(f"turns          {options.turns} programs exact", flush=True)
    for name in placements if options.signals else ():
        in_child(
            f"import interrupts; print('{name:14} signals ', interrupts.real_signals(world, {options.signals}))",
            name,
            disk,
            60 + options.signals,
        )
    for name in placements if options.ends else ():
        chance = random.Random(options.seed)
        for where in ("forward", "backward", "step", "offload"):
            closed = [interrupts.process_ends(where, name, disk, chance.random()) for _ in range(options.ends)]
            took = f"median {statistics.median(closed):.2f}, at most {max(closed):.2f} s"
            print(f"{name:14} ends amid {where}: {options.ends} times, closed in {took}", flush=True)
    if not options.skip_points:
        for name in placements:
            for scenario in ("forward_and_backward", "step_and_zero_grad", "reads", "reads_and_edits"):
                code = f"import interrupts; print('{name:14} {scenario}', interrupts.{scenario}(world, every=True), 'points')"
                in_child(code, name, disk, 1800)
    Path(disk).rmdir()
    print(f"all well after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
