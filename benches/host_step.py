"""Steps where the processor computes: plain PyTorch with its fused AdamW against funicular, in turns; JSON lines.

``python benches/host_step.py`` on a quiet machine. The demo's byte-level transformer (41 M parameters, fp32), the same weights and data for
all. Each round runs a few steps of every system, one system after the other, so that each ratio is of one minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import funicular

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from transformer import Config, Transformer


def policies(param: int, folder: str) -> dict[str, dict[str, Any]]:
    """Budgets by name; ``param`` is the bytes of all parameters."""
    common = {"device": "host", "nvme": {"paths": [folder]}, "log": {"level": "warning"}}
    host = {"params": {"tier": "host"}, "optimizer": {"tier": "host"}}
    disk = {"params": {"tier": "host"}, "optimizer": {"tier": "nvme"}}
    quarter = {"budget": {"hbm": f"{param // 4}B"}}
    return {
        "all fits": {**common, "budget": {"hbm": f"{8 * param}B"}},
        "streamed": {**common, **host, **quarter},
        "streamed, moments on NVMe": {**common, **disk, **quarter},
    }


class System:
    """A model, its optimizer and its data."""

    def __init__(self, args: argparse.Namespace, name: str, policy: dict[str, Any] | None) -> None:
        torch.manual_seed(args.seed)
        self.name = name
        self.model = Transformer(Config(layers=args.layers))
        if policy is None:
            self.opt: Any = torch.optim.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
        else:
            funicular.offload(self.model, policy)
            self.opt = funicular.AdamW(self.model.parameters(), lr=3e-4, weight_decay=0.1)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.shape = (args.batch, args.seq + 1)
        self.losses: list[float] = []

    def step(self) -> float:
        """Seconds of one step."""
        rows = torch.randint(256, self.shape, generator=self.generator)
        start = time.perf_counter()
        loss = self.model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        self.opt.step()
        self.opt.zero_grad()
        self.losses.append(loss.item())
        return time.perf_counter() - start


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="/var/tmp", help="a directory on the disk")
    parser.add_argument("--layers", type=int, default=Config().layers)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of each system per round")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    count = sum(p.numel() for p in Transformer(Config(layers=args.layers)).parameters())
    with tempfile.TemporaryDirectory(prefix="funicular-bench-", dir=args.dir) as folder:
        plain = System(args, "plain PyTorch", None)
        others = [System(args, name, policy) for name, policy in policies(4 * count, folder).items()]
        for system in (plain, *others):
            for _ in range(3):
                system.step()
        seconds: dict[str, list[float]] = {system.name: [] for system in (plain, *others)}
        for _ in range(args.rounds):
            for system in (plain, *others):
                seconds[system.name].append(statistics.median(system.step() for _ in range(args.steps)))
        for system in (plain, *others):
            ratios = [a / b for a, b in zip(seconds[system.name], seconds[plain.name], strict=True)]
            facts: dict[str, Any] = {
                "system": system.name, "parameters": count, "tokens": args.batch * args.seq, "threads": torch.get_num_threads(),
                "step_s": round(statistics.median(seconds[system.name]), 4), "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3),
                "loss_difference": max(abs(a - b) for a, b in zip(system.losses, plain.losses, strict=True)),
            }  # fmt: skip
            if system is not plain:
                stats = funicular.stats(system.model)
                facts |= {
                    "binding": stats.binding,
                    "stalls": {k: round(v, 4) for k, v in stats.step.stalls.items() if v},
                }
            print(json.dumps(facts), flush=True)
        for system in others:
            funicular.unwrap(system.model)


if __name__ == "__main__":
    main()
