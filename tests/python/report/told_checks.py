"""What ranks run in tests of what a run of several ranks says about itself."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import funicular
from funicular.integrations.figures import Figures
from models import CUDA, Block, Stack
from twin import SEED, World

#: what one rank, or an exchange, is late
NAP = 0.5
#: wide enough that each rank owns a part of each unit
WIDE = 160


def own_batch(step: int) -> torch.Tensor:
    """This rank's input of a step."""
    x = torch.randn(2, WIDE, generator=torch.Generator().manual_seed(1000 * step + dist.get_rank()))
    return x.cuda() if CUDA else x


def offloaded(world: World, **sections: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An offloaded model, and its optimizer."""
    torch.manual_seed(SEED)
    model = Stack(block=lambda: Block(WIDE), depth=3, width=WIDE)
    funicular.offload(model, world.policy(model, **{"debug": {"poison": False}, **sections}))
    return model, funicular.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    """Ordinary steps."""
    for step in range(steps):
        model(own_batch(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()


def figures(world: World) -> tuple[funicular.Stats, dict[str, Any], str, str, int, dict[str, float]]:
    """What is said after two steps, the bytes of the model's parameters, and what loggers of trainers are told."""
    model, opt = offloaded(world)
    loggers = Figures(model)
    train(model, opt, 2)
    said = funicular.stats(model)
    size = sum(p.nbytes for p in model.parameters())
    return said, said.to_dict(), str(said), said._repr_html_(), size, loggers.take()


def stop_soon() -> None:
    """Have this process stopped for a moment, with all its threads, when it is amid its step."""
    me = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep 0.03; kill -STOP {me}; sleep {NAP}; kill -CONT {me}"])


def late(world: World, where: str) -> funicular.Stats:
    """Rank 1 is late in its forward, at its step, or with its part of an update; or the exchange takes its time on both."""
    faults = "update:delay=40ms" if where == "update" else ""
    model, opt = offloaded(world, debug={"poison": False, "faults": faults})
    slow = dist.get_rank() == 1
    exchange = dist.batch_isend_irecv

    def slowly(ops: list[Any]) -> Any:
        time.sleep(NAP / 4)
        return exchange(ops)

    with pytest.MonkeyPatch.context() as patch:
        if where == "exchange":
            patch.setattr(dist, "batch_isend_irecv", slowly)
        for step in range(4):
            if slow and where == "backward":
                time.sleep(NAP)
            model(own_batch(step)).square().mean().backward()
            if slow and where == "step":
                time.sleep(NAP)
            if slow and where == "update":
                stop_soon()
            opt.step()
            opt.zero_grad()
    return funicular.stats(model)


def traced(world: World, path: str, steps: int, ended: str) -> list[str]:
    """Train with steps 2 and 3 traced; ``ended``: at the end the model is unwrapped, or rank 0 finds a trace missing. What the log says."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("funicular").addHandler(handler)
    logging.getLogger("funicular").setLevel("INFO")
    model, opt = offloaded(world, log={"trace": path, "trace_steps": [2, 3]})
    train(model, opt, 3)
    if ended == "missing":
        dist.barrier()
        if dist.get_rank() == 0:
            Path(path).with_suffix(".rank1.json").unlink()
    train(model, opt, steps - 3)
    if ended == "unwrap":
        funicular.unwrap(model)
    return [line for line in lines if line[:8] in ("FN-I306 ", "FN-I310 ", "FN-W308 ", "FN-W309 ")]
