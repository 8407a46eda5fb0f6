"""Signal handlers that use the model, at every point at which CPython looks at signals: see ``interrupts``."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import facts
import funicular
from interrupts import Point, Strike, agree, at_every_point, chosen, twins
from models import WIDTH
from twin import Run, World

#: codes of what a handler may be refused, and what it struck may be told afterwards
REFUSED = {"FN-E106", "FN-E408", "FN-E410"}
#: what torch says of weights that were changed after a graph had saved them, or while it did
CHANGED = ("modified by an inplace operation", "saved tensor pack hook is modifying")


class Handler(Strike):
    """Has a handler run, in place of Ctrl-C."""

    def __init__(self, handler: Callable[[], None], point: Point | None = None, visit: int = 1) -> None:
        super().__init__(point, visit)
        self.handler = handler

    def handle(self) -> None:
        """Run it; what it raises is told by the struck program."""
        with torch.enable_grad():
            self.handler()


class Program:
    """An offloaded model and its plain twin, what a program does with it, and what a handler does."""

    def __init__(self, world: World, folder: str) -> None:
        self.runs: list[Run] = twins(world, torch.float32)
        self.paged = self.runs[1]
        self.model, self.opt = self.paged.model, self.paged.opt
        self.x = self.paged.data(4, WIDTH)
        self.runs[0].data(4, WIDTH)
        self.folder = folder
        self.base = f"{folder}/base"
        funicular.save(self.model, self.opt, self.base)
        plain = self.runs[0]
        self.plain = copy.deepcopy((plain.model.state_dict(), plain.opt.state_dict()))
        self.refused = 0

    def go_back(self) -> None:
        """Both are as they were made."""
        self.load()
        self.runs[0].model.load_state_dict(self.plain[0])
        self.runs[0].opt.load_state_dict(copy.deepcopy(self.plain[1]))

    # ------------------------------------------------------------------ what is struck

    def differentiate(self) -> None:
        self.model(self.x).square().mean().backward()

    def step(self) -> None:
        self.opt.step()
        self.opt.zero_grad()

    def look(self) -> None:
        self.model.state_dict()
        self.opt.state_dict()
        for p in self.model.parameters():
            self.opt.state[p]["exp_avg"].sum()

    def save(self) -> None:
        funicular.save(self.model, self.opt, f"{self.folder}/program", overwrite=True)

    def load(self) -> None:
        funicular.load(self.base, self.model, self.opt)

    # ------------------------------------------------------------------ what strikes

    def reads(self) -> None:
        self.look()
        str(funicular.stats(self.model))

    def saves(self) -> None:
        with self.may_be_refused():
            funicular.save(self.model, self.opt, f"{self.folder}/handler", overwrite=True)

    def runs_the_model(self) -> None:
        with self.may_be_refused(), torch.no_grad():
            self.model(self.x)

    def clears(self) -> None:
        self.opt.zero_grad()

    def steps(self) -> None:
        with self.may_be_refused():
            self.opt.step()

    def trains(self) -> None:
        with self.may_be_refused():
            self.differentiate()
            self.step()

    def loads(self) -> None:
        with self.may_be_refused():
            self.load()

    @contextlib.contextmanager
    def may_be_refused(self) -> Any:
        try:
            yield
        except funicular.Error as error:
            assert error.code in REFUSED, error
            self.refused += 1


#: handlers after which the program is where it was
HARMLESS = ("reads", "saves", "runs_the_model")


def struck(world: World, action: str, handlers: list[str], *, every: bool = False) -> int:
    """Run an action with handlers at its points; returns how many points there are. Unless ``every``, the handlers share a few points."""
    with tempfile.TemporaryDirectory() as folder:
        program = Program(world, folder)

        def once(strike: Strike, harmless: bool) -> bool:
            if action == "step":
                program.differentiate()
            try:
                with strike:
                    getattr(program, action)()
            except funicular.Error as error:
                assert not harmless, error
                assert error.code in REFUSED, error
            except RuntimeError as error:
                assert not harmless, error
                assert any(text in str(error) for text in CHANGED), error
            finally:
                torch.set_grad_enabled(True)
            if harmless and action == "step":
                program.runs[0].model(program.x).square().mean().backward()
                program.runs[0].opt.step()
            elif action == "load" or not harmless:
                program.go_back()
            assert facts.saved_tensor_hooks() == 0, "hooks are left"
            for run in program.runs:
                run.opt.zero_grad()
                run.train(1, look=False)  # a graph that was given up may still hold frames
            agree(program.runs, torch.float32)
            return strike.fired

        counter = Strike()
        once(counter, True)
        visits = counter.visits
        points = list(visits) if every else chosen(visits, 70)
        for names in [[name] for name in handlers] if every else [handlers]:
            striking = dict(zip(points, itertools.cycle(names)))

            def strike(point: Point, visit: int, striking: dict[Point, str] = striking) -> bool:
                name = striking[point]
                return once(Handler(getattr(program, name), point, visit), name in HARMLESS)

            at_every_point(Counter({point: visits[point] for point in points}), True, strike, first=True)
        return len(visits)
