"""What ranks run whose host memory is measured: functions that return what a test looks at."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import funicular
from models import Block, Stack


def tall(depth: int) -> nn.Module:
    """Blocks of 8 MiB each."""
    return Stack(block=lambda: Block(1024), depth=depth, width=1024)


def _own() -> int:
    """Bytes of memory that this process shares with no other one; what is forked counts."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10


def taken_at_the_start(depth: int, checkpoint: str) -> int:
    """The most that this rank's own memory grows by until the model is offloaded; without a checkpoint each rank builds the model."""
    before, most, over = _own(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.002):
            most = max(most, _own() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with torch.device("meta" if checkpoint else "cpu"):
            model = tall(depth)
        policy = {"device": "host", "budget": {"hbm": "48MiB", "host": "1GiB"}}
        funicular.offload(model, policy, checkpoint=checkpoint or None)
        most = max(most, _own() - before)
    finally:
        over.set()
        watcher.join()
    return most


#: bytes of the compute tier of each rank, which is host memory here, and of the host for all
HBM, HOST = 3 * (8 << 20) + (64 << 10), 560 << 20


def trained_and_saved(group: str, early: bool, depth: int, checkpoint: str, folder: str) -> None:
    """Load a model, train it, save it and train on; in a memory group from the first or, unless ``early``, from the model's loading on."""

    def enter() -> None:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()))

    def train(steps: int) -> None:
        for _ in range(steps):
            model(torch.ones(2, 1024)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()

    # What torch and the processes take for themselves is not the group's: what is there already is charged to another one.
    model: nn.Module = nn.Sequential(nn.Linear(1024, 1024))
    opt: torch.optim.Optimizer = torch.optim.AdamW(model.parameters())
    train(2)
    gc.collect()
    dist.barrier()
    if early:
        enter()
    with torch.device("meta"):
        model = tall(depth)
    policy = {
        "device": "host",
        "budget": {"hbm": f"{HBM}B", "host": f"{HOST}B"},
        "optimizer": {"spare": "0B"},
        "debug": {"poison": False},
    }
    funicular.offload(model, policy, checkpoint=checkpoint)
    dist.barrier()
    if not early:
        enter()
    opt = funicular.AdamW(model.parameters())
    train(2)
    if dist.get_rank() == 0:
        funicular.save(model, opt, folder)
    train(2)
