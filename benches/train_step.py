"""One training step, everything in HBM against funicular, same model, same data: JSON lines.

``python benches/train_step.py --layers 24 --dim 2048 --tokens 16384`` on a machine with a GPU. Parameters bf16, fp32 masters,
AdamW, gradients clipped to 1.0, every block checkpointed. FLOPs are counted as 6 per matrix parameter and token plus causal
attention, recomputation not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import funicular

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from transformer import Config, Transformer

HYPER = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class InMemoryAdamW:
    """Fused AdamW over fp32 masters, everything in HBM."""

    def __init__(self, model: nn.Module) -> None:
        self.params = list(model.parameters())
        self.masters = [p.detach().float() for p in self.params]
        self.opt = torch.optim.AdamW(self.masters, fused=True, **HYPER)

    def step(self) -> None:
        for p, m in zip(self.params, self.masters, strict=True):
            m.grad = p.grad.float()
        self.opt.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


def build(args: argparse.Namespace) -> nn.Module:
    """The same weights every time, on the host."""
    torch.manual_seed(0)
    config = Config(
        vocab=args.vocab, dim=args.dim, layers=args.layers, heads=args.dim // 128, hidden=args.hidden,
        checkpoint="saved_tensors",
    )  # fmt: skip
    return Transformer(config).to(torch.bfloat16)


def run(args: argparse.Namespace, model: nn.Module, opt: InMemoryAdamW | funicular.AdamW) -> dict[str, object]:
    """Time steps and keep the losses."""
    generator = torch.Generator().manual_seed(1)
    losses, seconds = [], []
    for i in range(args.warmup + args.steps):
        ids = torch.randint(args.vocab, (args.tokens // args.seq, args.seq + 1), generator=generator).to("cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss: Tensor = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
        torch.cuda.synchronize()
        if i >= args.warmup:
            seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds)
    return {"seconds": middle, "spread": max(seconds) - min(seconds), "tokens_per_s": args.tokens / middle,
            "losses": losses, "hbm_peak_gib": torch.cuda.max_memory_allocated() / 2**30}  # fmt: skip


def measure(name: str, args: argparse.Namespace, make: Callable[[], tuple[nn.Module, object]]) -> dict[str, object]:
    """One line of the table."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model, opt = make()
    result = {"system": name, "parameters": sum(p.numel() for p in model.parameters()), **run(args, model, opt)}
    if name != "in_hbm":
        stats = funicular.stats(model)
        result["stalls"] = stats.stalls
        result["links"] = {k: round(v.gb_per_s, 2) for k, v in stats.links.items()}
        result["prefetch"] = vars(stats.prefetch)
        result["budgets"] = {k: v.peak for k, v in stats.budgets.items()}
        result["binding"] = stats.binding
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"dim": 2048, "layers": 24, "hidden": 5504, "vocab": 32000, "seq": 2048, "tokens": 16384,
                          "steps": 4, "warmup": 2}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--hbm", default="16GiB", help="budget of the compute tier")
    parser.add_argument("--tier", default="host", choices=["host", "nvme"], help="home of the optimizer's states")
    args = parser.parse_args()

    def resident() -> tuple[nn.Module, object]:
        model = build(args).to("cuda")
        return model, InMemoryAdamW(model)

    def offloaded() -> tuple[nn.Module, object]:
        model = build(args)
        policy = {
            "device": "cuda",
            "budget": {"hbm": args.hbm},
            "optimizer": {"tier": args.tier},
            "params": {"tier": "host"},
        }
        if args.tier == "nvme":
            policy["nvme"] = {"paths": [tempfile.mkdtemp(dir="/var/tmp")]}
        funicular.offload(model, policy)
        return model, funicular.AdamW(model.parameters(), **HYPER)

    a = measure("in_hbm", args, resident)
    b = measure("funicular", args, offloaded)
    print(json.dumps({"ratio": b["tokens_per_s"] / a["tokens_per_s"],
                      "loss_difference": max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True))}))  # fmt: skip


if __name__ == "__main__":
    main()
