"""Threads that read, evaluate, differentiate and save at random beside a training loop: ``threads_soak.py [SECONDS] [SEED]``, per placement.

The weights after each step are those of plain PyTorch, bit for bit: what changes nothing must change nothing. Part of a step is itself done by other
threads, where the result does not depend on their order: two backwards at once, and clearing gradients.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent)]

import children
import funicular
from conftest import DEVICE, DISK, PLACEMENTS
from funicular import testing
from models import WIDTH, stack
from twin import Run, World, same

#: seconds after which a step counts as one that hangs
LONG = 120
#: steps of one model
STEPS = 25
#: what plain PyTorch may raise in a thread that differentiates while another one steps
STEPPED = ("modified by an inplace operation", "pack hook")


class Episode:
    """One model, its plain twin, and the threads beside it."""

    def __init__(self, world: World, seed: int) -> None:
        self.chance = random.Random(seed)
        pick = self.chance.choice
        self.depth, frames = self.chance.randint(3, 6), self.chance.randint(2, 5)
        self.dtype = pick([torch.float32, torch.bfloat16])
        world = World(**{**vars(world), "poison": pick([True, False])})
        faults = pick(["", "sums:up"]) if world.gradients != "nvme" else ""
        self.plain, self.paged = Run(world, False), Run(world, True)
        for run in (self.plain, self.paged):
            torch.manual_seed(seed)
            run.model = run.wrap(
                stack(depth=self.depth)().to(self.dtype),
                **({"frames": frames, "debug": {"faults": faults}} if run.offloaded else {}),
            )
            run.opt = run.adamw()
        self.folder = Path(tempfile.mkdtemp(prefix="saves-", dir=world.paths[0]))
        self.over = threading.Event()
        #: torch may end the process where a gradient is asked for while a backward sets it: what is asked before may be used meanwhile
        self.setting = threading.Lock()
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self.history = [self.weights(self.plain)]

    def weights(self, run: Run) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone().cpu() for name, p in run.model.named_parameters()}

    # ------------------------------------------------------------------ what others do

    def readers(self) -> list[Callable[[random.Random], None]]:
        looks = [
            self.gradient, self.gradient_kept, self.gradients, self.weight, self.weight_kept, self.state_dict, self.evaluates,
            self.differentiates, self.differentiates_one, self.stats, self.makes_room, self.states,
        ]  # fmt: skip
        return [*looks, *looks, self.saves]

    def some(self, chance: random.Random) -> torch.nn.Parameter:
        return chance.choice(list(self.paged.model.parameters()))

    def see(self, tensor: torch.Tensor) -> None:
        if not bool(torch.isfinite(tensor.detach().clone()).all()):
            self.wrong.append(f"not finite: {tensor.shape}\n{''.join(traceback.format_stack(limit=4))}")

    def grad_of(self, p: torch.Tensor) -> torch.Tensor | None:
        with self.setting:
            return p.grad

    def gradient(self, chance: random.Random) -> None:
        grad = self.grad_of(self.some(chance))
        if grad is not None:
            self.see(chance.choice([torch.clone, torch.sum, torch.Tensor.detach])(grad).clone())

    def gradient_kept(self, chance: random.Random) -> None:
        grad = self.grad_of(self.some(chance))
        if grad is not None:
            kept = chance.choice([grad, grad.detach(), grad[0]])
            time.sleep(0.002)
            self.see(kept.clone())

    def gradients(self, chance: random.Random) -> None:
        grads = [self.grad_of(p) for p in self.paged.model.parameters()]
        if all(grad is not None for grad in grads):
            self.see(torch.stack(torch._foreach_norm(grads)))

    def weight(self, chance: random.Random) -> None:
        p = self.some(chance)
        self.see(chance.choice([torch.Tensor.detach, torch.sum, torch.clone])(p))

    def weight_kept(self, chance: random.Random) -> None:
        kept = self.some(chance).detach()
        time.sleep(0.002)
        self.see(kept)

    def state_dict(self, chance: random.Random) -> None:
        for value in self.paged.model.state_dict().values():
            self.see(value.clone())

    def evaluates(self, chance: random.Random) -> None:
        with torch.no_grad():
            self.see(self.paged.model(torch.ones(4, WIDTH, dtype=self.dtype)))

    def differentiates(self, chance: random.Random) -> None:
        params = list(self.paged.model.parameters())
        with stepped():
            loss = self.paged.model(torch.ones(4, WIDTH, dtype=self.dtype)).float().square().mean()
            for grad in torch.autograd.grad(loss, params):
                self.see(grad)

    def differentiates_one(self, chance: random.Random) -> None:
        p = self.some(chance)
        with stepped():
            self.see(torch.autograd.grad((p * p).sum(), p)[0])

    def stats(self, chance: random.Random) -> None:
        str(funicular.stats(self.paged.model))

    def makes_room(self, chance: random.Random) -> None:
        """As anything that finds no room."""
        session: Any = testing.inspect(self.paged.model).session
        session.drop_unused()

    def states(self, chance: random.Random) -> None:
        states = self.paged.opt.state.get(self.some(chance))
        if states:
            self.see(states["exp_avg"].clone())

    def saves(self, chance: random.Random) -> None:
        """A checkpoint is the state after one of the steps, all of it."""
        path = self.folder / f"{threading.get_ident()}-{time.monotonic_ns()}"
        funicular.save(self.paged.model, self.paged.opt, path)
        model: Any = stack(depth=self.depth)().to(self.dtype)
        step = funicular.load(path, model).step
        shutil.rmtree(path)
        found = {name: p.detach() for name, p in model.named_parameters()}
        if not any(same_weights(found, then) for then in self.history[max(0, step - 1) : step + 1]):
            self.wrong.append(f"a checkpoint of step {step} is of no step")

    def work(self, seed: int) -> None:
        chance, readers = random.Random(seed), self.readers()
        try:
            while not self.over.is_set():
                reader = chance.choice(readers)
                reader(chance)
                self.done[reader.__name__] += 1
                time.sleep(chance.choice([0.0, 0.0, 0.001]))
        except BaseException:
            self.wrong.append(traceback.format_exc())

    # ------------------------------------------------------------------ training

    def step(self) -> None:
        count, beside = self.chance.choice([(1, False), (2, False), (2, True), (2, True), (3, False)])
        clip = self.chance.choice([None, {}, {"foreach": False}])
        to_none, elsewhere = self.chance.choice([True, True, False]), self.chance.choice([True, False])
        data = [self.plain.data(4, WIDTH, dtype=self.dtype) for _ in range(count)]
        for run in (self.plain, self.paged):
            losses = [run.model(x).float().square().mean() for x in data]
            with self.setting:
                if beside and run.offloaded:
                    at_once([loss.backward for loss in losses])
                else:
                    for loss in losses:
                        loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1, **clip)
            if not run.offloaded:
                run.opt.step()
                self.history.append(self.weights(run))
            else:
                run.opt.step()
            # By another thread, while the update may be under way.
            clear = lambda run=run: run.opt.zero_grad(set_to_none=to_none)
            at_once([clear]) if elsewhere and run.offloaded else clear()
        if not same_weights(self.weights(self.paged), self.history[-1]):
            names = [n for n, p in self.weights(self.paged).items() if not same(p, self.history[-1][n])]
            self.wrong.append(
                f"step {len(self.history) - 1} ({count} backwards, beside {beside}, clip {clip}): {names}"
            )

    def run(self, until: float) -> tuple[int, Counter[str]]:
        threads = [threading.Thread(target=self.work, args=(self.chance.random(),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            while len(self.history) <= STEPS and time.monotonic() < until and not self.wrong:
                faulthandler.dump_traceback_later(LONG, exit=True)
                self.step()
        finally:
            self.over.set()
            for thread in threads:
                thread.join()
            faulthandler.cancel_dump_traceback_later()
        assert not self.wrong, "\n".join(self.wrong[:3])
        return len(self.history) - 1, self.done


def same_weights(found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(same(value, right[name]) for name, value in found.items())


@contextlib.contextmanager
def stepped() -> Any:
    """Forgive what plain PyTorch raises where a step comes between a forward and its backward."""
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in STEPPED):
            raise


def at_once(actions: list[Callable[[], None]]) -> None:
    """Run each in a thread of its own."""
    errors: list[BaseException] = []

    def guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def campaign(world: World, seconds: float, seed: int) -> str:
    """Episodes for that long; what was done."""
    torch.set_num_threads(1)
    faulthandler.enable()
    until, steps, done, episodes = time.monotonic() + seconds, 0, Counter[str](), 0
    while time.monotonic() < until:
        try:
            taken, others = Episode(world, seed + episodes).run(until)
        except BaseException as error:
            raise AssertionError(f"episode of seed {seed + episodes}") from error
        steps, episodes = steps + taken, episodes + 1
        done += others
    what = ", ".join(f"{count} {name}" for name, count in sorted(done.items()))
    return f"{episodes} models, {steps} steps exact beside {what}"


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    names = sys.argv[3:] or [name for name in PLACEMENTS if name != "nvme-io_uring"]
    for name in names:
        disk = tempfile.mkdtemp(prefix="funicular-threads-", dir=DISK)
        code = f"import threads_soak; print(threads_soak.campaign(world, {seconds}, {seed}))"
        status, out, err = children.finish(children.start(code, disk, PLACEMENTS[name], DEVICE), seconds + 2 * LONG)
        shutil.rmtree(disk, ignore_errors=True)
        assert status == 0, f"{name}: status {status}\n{out}\n{err}"
        print(f"{name:14} {out.strip()}", flush=True)


if __name__ == "__main__":
    main()
