"""Kills training processes at random moments of their saves, and checks what is left: ``kill_saves.py [COUNT] [SEED]``.

Each process goes on from the newest checkpoint, so that every checkpoint is compared with a run that was never killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent)]
torch.set_num_threads(1)

import funicular
from funicular import _core
from models import Decoder
from twin import Run, World

PLACES = [{}, {"params": "nvme", "optimizer": "nvme"}, {"optimizer": "nvme"}]
#: saves take some tens of milliseconds
SLOW = {"faults": "write:delay=2ms@1x1000000000"}


def one_step(run: Run, step: int) -> None:
    """The same in every process that makes it."""
    torch.manual_seed(step)
    run.generator = torch.Generator().manual_seed(step)
    run.train(1, look=False)
    run.notes.clear()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return Decoder(dtype=torch.bfloat16, tie=True)


def newest(base: Path) -> Path | None:
    found = [p for p in base.iterdir() if not p.name.startswith(".")]
    return max(found, key=lambda p: (step_of(p), p.name), default=None)


def step_of(path: Path) -> int:
    import json

    return int(json.loads((path / "funicular.json").read_text())["training"]["step"])


def trainer(base: Path, disk: str, ready: int, seed: int) -> None:
    """Train and save until killed."""
    chance = random.Random(seed)
    world = World("host", (disk,), **chance.choice(PLACES))
    run = Run(world, True)
    run.model = run.wrap(model(), debug=SLOW)
    run.opt = run.adamw()
    last = newest(base)
    step = 0 if last is None else funicular.load(last, run.model, run.opt).step
    os.write(ready, b"x")
    while True:
        step += 1
        one_step(run, step)
        more: dict[str, Any] = chance.choice([{"keep": 2}, {"overwrite": True}])
        path = base / (f"step-{step}" if "keep" in more else "last")
        funicular.save(run.model, run.opt, path, wait=chance.random() < 0.5, shard_bytes=120_000, **more)


class Reference:
    """A run that is never killed."""

    def __init__(self) -> None:
        self.run = Run(World("host", ()), False)
        self.run.model = model()
        self.run.opt = self.run.adamw()
        self.seen: list[dict[str, torch.Tensor]] = []

    def at(self, step: int) -> dict[str, torch.Tensor]:
        """Weights and moments after a step."""
        while len(self.seen) < step:
            one_step(self.run, len(self.seen) + 1)
            now = {}
            for name, p in self.run.model.named_parameters():
                now[name] = p.detach().clone()
                states = self.run.opt.state[p]
                now |= {f"{name}.{k}": states[k].clone() for k in ("exp_avg", "exp_avg_sq")}
            self.seen.append(now)
        return self.seen[step - 1]


def check(path: Path, reference: Reference) -> int:
    """Raise unless a checkpoint is whole and what it says it is; its step."""
    _core.Checkpoint(str(path), True).verify()
    step = step_of(path)
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    for name, expected in reference.at(step).items():
        if not torch.equal(found[name], expected):
            raise AssertionError(f"{path}: '{name}' is not that of step {step}")
    return step


def campaign(count: int, seed: int) -> str:
    """Kill so many processes; a line on what happened."""
    chance = random.Random(seed)
    reference = Reference()
    base = Path(tempfile.mkdtemp(prefix="funicular-kill-", dir=os.environ.get("FUNICULAR_TEST_DIR", "/var/tmp")))
    disk = base / "disk"
    saves = base / "saves"
    disk.mkdir()
    saves.mkdir()
    last = leftovers = grew = 0
    try:
        for k in range(count):
            reading, ready = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    trainer(saves, str(disk), ready, seed * 1000 + k)
                finally:
                    os._exit(1)
            os.close(ready)
            if os.read(reading, 1) != b"x":
                raise AssertionError(f"process {k} failed before it was killed")
            time.sleep(chance.uniform(0, 1.2))
            os.kill(pid, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
                raise AssertionError(f"process {k} failed before it was killed")
            os.close(reading)
            leftovers += any(p.name.startswith(".") for p in saves.iterdir())
            steps = [check(p, reference) for p in saves.iterdir() if not p.name.startswith(".")]
            if max(steps, default=0) < last:
                raise AssertionError(f"after {k} kills the newest checkpoint is of step {max(steps)}, it was of {last}")
            grew += max(steps, default=0) > last
            last = max(steps, default=0)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return f"{count} kills: {leftovers} amid a save, {grew} after new checkpoints, step {last} reached, every checkpoint whole and exact"


if __name__ == "__main__":
    print(campaign(int(sys.argv[1]) if len(sys.argv) > 1 else 10, int(sys.argv[2]) if len(sys.argv) > 2 else 1))
