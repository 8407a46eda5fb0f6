"""Random programs over units with spare frames, whose parameters change places: everything of it from a seed, the same on both sides.

Between forward, backward and step weights, states and views are read and edited, states and weights loaded, checkpoints saved,
waited for or given up; steps are clipped, lack gradients, or are left out. What checkpoints hold is compared too.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import random
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import funicular
from models import WIDTH, stack
from twin import Run, World, compare

__all__ = ["one"]


class Program:
    """One side's run of it."""

    def __init__(self, run: Run, seed: int, folder: Path, dtype: torch.dtype) -> None:
        self.run, self.folder, self.dtype = run, folder, dtype
        self.chance = random.Random(seed)
        self.views: list[Tensor] = []
        self.saved: Any = None
        #: saves under way, where their notes go, and the tensors that they hold
        self.saves: list[tuple[Any, int, list[str]]] = []
        self.between = [
            self.edit, self.edit, self.read, self.view, self.drop_views, self.edit_through_a_view, self.look_at_views,
            self.read_state, self.edit_state, self.evaluate, self.edit_inside, self.keep_states, self.load_states,
            self.load_weights, self.save, self.save,
        ]  # fmt: skip

    def param(self) -> torch.nn.Parameter:
        return self.chance.choice(list(self.run.model.parameters()))

    def rest(self) -> None:
        """What is begun ahead gets more or less far."""
        seconds = self.chance.choice([0, 0, 0.003, 0.03])
        if self.run.offloaded:
            time.sleep(seconds)

    def loss(self) -> Tensor:
        return self.run.model(self.run.data(4, WIDTH).to(self.dtype)).float().square().mean()

    @torch.no_grad()
    def edit(self) -> None:
        p, how = self.param(), self.chance.randrange(3)
        if how == 0:
            p.mul_(1.25)
        elif how == 1:
            p.data.add_(0.0625)
        else:
            p.view(-1)[0] = 0.5

    def read(self) -> None:
        self.run.record("read", [self.param().detach().clone() for _ in range(3)])

    def view(self) -> None:
        self.views.append(self.param().detach())

    def drop_views(self) -> None:
        self.views.clear()
        gc.collect()

    def edit_through_a_view(self) -> None:
        if self.views:
            self.chance.choice(self.views).mul_(0.875)

    def look_at_views(self) -> None:
        self.run.record("views", [view.clone() for view in self.views])

    def read_state(self) -> None:
        if state := self.run.opt.state.get(self.param()):
            self.run.record("state", [state["exp_avg"].clone(), state["exp_avg_sq"].clone()])

    def edit_state(self) -> None:
        if state := self.run.opt.state.get(self.param()):
            state["exp_avg"].mul_(0.5)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.run.record("eval", self.run.model(self.run.data(4, WIDTH).to(self.dtype)))

    def edit_inside(self) -> None:
        def clamp(module: torch.nn.Module, args: Any) -> None:
            with torch.no_grad():
                module.weight.clamp_(-0.3, 0.3)

        hook = self.chance.choice(list(self.run.model.layers)).down.register_forward_pre_hook(clamp)
        self.evaluate()
        hook.remove()

    def keep_states(self) -> None:
        self.saved = copy.deepcopy(self.run.opt.state_dict())

    def load_states(self) -> None:
        if self.saved is not None:
            self.run.opt.load_state_dict(copy.deepcopy(self.saved))

    def load_weights(self) -> None:
        self.run.model.load_state_dict({name: t * 0.99 for name, t in self.run.model.state_dict().items()})

    def save(self) -> None:
        given_up, wait = self.chance.random() < 0.3, self.chance.random() < 0.3
        nap = self.chance.choice([0, 0.002, 0.01])
        named = dict(self.run.model.named_parameters())
        moments = {n: self.run.opt.state[p]["exp_avg"] for n, p in named.items() if self.run.opt.state.get(p)}
        at = len(self.run.notes)
        if not given_up or wait:
            for name, t in [*named.items(), *((f"{n}.exp_avg", t) for n, t in moments.items())]:
                self.run.notes.append((name, None if self.run.offloaded else t.detach().to("cpu", copy=True)))
        if not self.run.offloaded:
            return
        self.end_those_given_up()
        path = self.folder / str(len(self.saves))
        handle = funicular.save(self.run.model, self.run.opt, path, wait=wait)
        names = [name for name, _ in self.run.notes[at:]]
        if given_up and not wait:
            time.sleep(nap)
            handle.cancel()
        self.saves.append((handle, at, names))

    def end_those_given_up(self) -> None:
        for handle, _, names in self.saves:
            if not names:
                with contextlib.suppress(funicular.Error):
                    handle.wait()

    def end_saves(self) -> None:
        """Note what they hold."""
        self.end_those_given_up()
        for number, (handle, at, names) in enumerate(self.saves):
            if not names:
                continue
            handle.wait()
            held = {
                k: t for file in (self.folder / str(number)).rglob("*.safetensors") for k, t in load_file(file).items()
            }
            for i, name in enumerate(names):
                self.run.notes[at + i] = (name, held[name])

    def some(self, times: int, percent: int) -> None:
        for _ in range(times):
            if self.chance.randrange(100) < percent:
                self.chance.choice(self.between)()
                self.rest()

    def step(self) -> None:
        run, what = self.run, self.chance.randrange(10)
        if what == 0:
            run.record("norm", torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1e-3))
        elif what == 1:
            self.param().grad = None
        elif what == 2:
            run.opt.param_groups[0]["lr"] *= 0.9
        elif what == 3 and (grad := self.param().grad) is not None:
            grad.mul_(2)
        self.some(1, 15)
        self.rest()
        if self.chance.random() < 0.92:
            run.opt.step()
        self.rest()
        run.opt.zero_grad(set_to_none=self.chance.random() < 0.5)

    def go(self, steps: int) -> None:
        for _ in range(steps):
            self.some(2, 25)
            for _ in range(self.chance.choice([1, 1, 1, 2])):
                loss = self.loss()
                self.run.record("loss", loss)
                loss.backward()
                self.rest()
            self.some(2, 20)
            self.step()
            self.look_at_views()
        self.end_saves()


def one(world: World, seed: int, folder: Path, steps: int = 14) -> Run:
    """Run the program of a seed on both sides; raises if anything differs."""
    chance = random.Random(seed * 7 + 1)
    dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16])
    frames = chance.choice([1.0, 1.5, 3.0, 9.0])
    faults = ["", "home:delay=3ms", "home:delay=20ms", "update:delay=2ms", "states:delay=0ms", "states:delay=10ms"]
    faults = chance.choice([*faults, "states:delay=3ms,home:delay=3ms"])
    sections: dict[str, Any] = {"optimizer": {"spare": "32MiB"}, "debug": {"faults": faults}}
    if chance.random() < 0.6:
        # No step waits for its updates, on the host device neither, where something comes from NVMe.
        sections["override"] = [{"match": "layers.5*", "optimizer": "nvme"}]
    script = lambda run: Program(run, seed, folder, dtype).go(steps)
    return compare(world, lambda: stack(depth=6)().to(dtype), script, frames, **sections)
