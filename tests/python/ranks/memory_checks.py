"""What ranks run whose host memory is measured: functions that return what a test looks at."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
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
