"""The exchange of gradients and their mean beside NCCL's reduce_scatter of the same bytes, in turns; a JSON line.

``torchrun --nproc-per-node 2 benches/exchange.py --millions 113`` on a machine with several GPUs: bf16 elements of a unit. The exchange sends bytes
to their owner, who sums them in fp32 in the order of ranks; reduce_scatter sums in an order of NCCL's choice. Both are timed by events on each
rank's own stream, from a meeting of all ranks to the end; the slowest rank counts, and of the rounds the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

import funicular
from funicular import testing

if TYPE_CHECKING:
    from collections.abc import Callable


def milliseconds(work: Callable[[], object], times: int) -> float:
    """Of one, of so many in a row."""
    torch.cuda.synchronize()
    dist.barrier()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    slowest = torch.tensor(start.elapsed_time(end) / times, device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=113, help="elements of the gradient, in millions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--times", type=int, default=8, help="in a row, in each round")
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    size = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16))
    funicular.offload(model, {"device": "cuda"})
    count = args.millions * 1_000_000 // (64 * size) * (64 * size)
    gradient = torch.randn(count, device="cuda").bfloat16()
    part = torch.empty(count // size, dtype=torch.bfloat16, device="cuda")
    ways: dict[str, Callable[[], object]] = {
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, gradient),
        "exchange": lambda: testing.exchange(model, gradient),
    }
    for work in ways.values():
        milliseconds(work, 3)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, work in ways.items():
            found[name].append(milliseconds(work, args.times))
    medians = {name: statistics.median(all_) for name, all_ in found.items()}
    if dist.get_rank() == 0:
        line = {"ranks": size, "elements": count, "gpu": torch.cuda.get_device_name()}
        line |= {f"{name}_ms": round(ms, 4) for name, ms in medians.items()}
        line |= {f"{name}_spread_ms": [round(min(all_), 4), round(max(all_), 4)] for name, all_ in found.items()}
        print(json.dumps(line | {"of_reduce_scatter": round(medians["reduce_scatter"] / medians["exchange"], 3)}))
    funicular.unwrap(model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
