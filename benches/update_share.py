"""Updates of what is homed on the host by the processor, by the GPU, and by both: rates from one run, interleaved; JSON lines.

``python benches/update_share.py --units 4 --millions 128`` on a machine with a GPU. Each round times the step of every split, from
the call to the end of all updates, with nothing else under way; the rate is that of the median. ``--beside`` copies both ways over
the link meanwhile, as weights and gradients would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import nn

import funicular
from funicular import testing

SPLITS = ("processor", "lanes", "rates")


class Copies:
    """Keeps both directions of the link busy from when it is entered until it is left."""

    def __init__(self, on: bool, seconds: float) -> None:
        self.count = int(seconds * 50e9 / (64 << 20)) if on else 0
        self.streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        self.host = [torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.device = [torch.empty(64 << 20, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def start(self) -> None:
        """Enqueue them."""
        for _ in range(self.count):
            for i, stream in enumerate(self.streams):
                with torch.cuda.stream(stream):
                    to, source = (self.device, self.host) if i == 0 else (self.host, self.device)
                    to[i].copy_(source[i], non_blocking=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=4)
    parser.add_argument("--millions", type=int, default=128, help="parameters of a unit")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--beside", action="store_true", help="with copies both ways meanwhile")
    args = parser.parse_args()
    width = 4096
    rows = args.millions * 1_000_000 // width
    blocks = [nn.Linear(width, rows, bias=False, dtype=torch.bfloat16) for _ in range(args.units)]
    model = nn.ModuleList(blocks)
    policy = {
        "device": "cuda",
        "budget": {"hbm": f"{3 * rows * width * 2 + (512 << 20)}B"},
        "params": {"tier": "host"},
        "optimizer": {"tier": "host", "where": "gpu", "spare": "0B"},
    }
    funicular.offload(model, policy)
    opt = funicular.AdamW(model.parameters(), lr=1e-4)
    engine = testing.inspect(model).engine
    x = torch.ones(2, width, device="cuda", dtype=torch.bfloat16)
    params = args.units * rows * width
    copies = Copies(args.beside, params / 1.5e9)
    seconds: dict[str, list[float]] = {split: [] for split in SPLITS}
    shares: dict[str, float] = {}
    for number in range(args.rounds + 2):
        for split in SPLITS:
            torch.stack([block(x).float().square().mean() for block in blocks]).sum().backward()
            torch.cuda.synchronize()
            engine.split_updates(split)
            before = funicular.stats(model).updated
            copies.start()
            start = time.perf_counter()
            opt.step()
            engine.settle_all()
            taken = time.perf_counter() - start
            torch.cuda.synchronize()
            opt.zero_grad()
            after = funicular.stats(model).updated
            if number >= 2:  # the first rounds teach the rates
                seconds[split].append(taken)
                shares[split] = (after.gpu - before.gpu) / params
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "threads": funicular.stats(model).threads}))
    for split in SPLITS:
        middle = statistics.median(seconds[split])
        rate = {"gparam_per_s": round(params / middle / 1e9, 3), "gpu_share": round(shares[split], 3)}
        of = round(statistics.median(seconds["processor"]) / middle, 3)
        print(json.dumps({"split": split, "seconds": round(middle, 4), **rate, "of_processor": of}))


if __name__ == "__main__":
    main()
