"""One training step: everything in HBM against funicular under several policies, FSDP2's CPU offload too; JSON lines.

``python benches/train_step.py --size 3.14 --tokens 16384 --systems in_hbm,host,auto`` on a machine with a GPU. bf16 parameters with
fp32 masters, AdamW, gradients clipped to norm 1.0, every block checkpointed, chunked cross entropy, sequences of 2048; the same
initial weights and the same data for all. The losses of all systems are compared.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import funicular

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama import SHAPES, build

HYPER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SEQ = 2048


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
        self.opt.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


def train(args: argparse.Namespace, model: nn.Module, opt: Any) -> dict[str, Any]:
    """Time steps; the loss is read at the end only, so that the program runs ahead of the GPU as it would in training."""
    generator = torch.Generator().manual_seed(1)
    shape = (args.tokens // SEQ, SEQ + 1)
    count = args.warmup + args.steps
    data = [torch.randint(args.vocab, shape, generator=generator).to("cuda") for _ in range(count)]
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    ends: list[torch.cuda.Event] = []
    enqueued: list[tuple[float, float, float]] = []
    for ids in data:
        began = time.perf_counter()
        loss = model(ids)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm).detach())
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        ends.append(event)
        enqueued.append((forward - began, backward - forward, time.perf_counter() - backward))
    torch.cuda.synchronize()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)][args.warmup - 1 :]
    middle = statistics.median(seconds)
    return {
        "seconds": round(middle, 4), "mean": round(statistics.mean(seconds), 4), "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4), "tokens_per_s": round(args.tokens / middle),
        "enqueue_s": [round(statistics.median(part), 4) for part in zip(*enqueued[args.warmup :], strict=True)],
        "clipped": sum(float(n) > args.max_norm for n in norms[args.warmup :]), "steps": len(seconds),
        "losses": [round(float(x), 5) for x in losses], "hbm_torch_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }  # fmt: skip


def host_gib() -> float:
    """Proportional share of memory that this process holds."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return round(int(line.split()[1]) / 2**20, 2)
    return 0.0


def facts(model: nn.Module) -> dict[str, Any]:
    """What the runtime counted."""
    stats = funicular.stats(model)
    links = {
        k: {"gb": round(v.bytes / 1e9, 2), "gb_per_s": round(v.gb_per_s, 2)} for k, v in stats.links.items() if v.bytes
    }
    return {
        "step_time": None if stats.step is None else vars(stats.step), "lost": stats.lost,
        "stalls": {k: round(v, 3) for k, v in stats.stalls.items()}, "links": links, "binding": stats.binding,
        "prefetch": vars(stats.prefetch), "ahead": vars(stats.ahead), "updated": vars(stats.updated), "home_uses": stats.home_uses,
        "activations": vars(stats.activations),
        "budgets_gib": {k: round(v.peak / 2**30, 2) for k, v in stats.budgets.items()},
    }  # fmt: skip


def in_hbm(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Everything on the GPU."""
    model = build(args.size, "cuda")
    return model, InMemoryAdamW(model)


def offloaded(args: argparse.Namespace, **tiers: str) -> tuple[nn.Module, Any]:
    """Funicular, with homes where ``tiers`` says, else where the planner puts them."""
    # Made on the GPU, so that the weights are those of the other systems, then moved out of it.
    model = build(args.size, "cuda").to("cpu")
    torch.cuda.empty_cache()
    policy: dict[str, Any] = {
        "device": "cuda", "budget": {"hbm": args.hbm},
        "params": {"tier": tiers.get("params", "auto")}, "optimizer": {"tier": tiers.get("optimizer", "auto"), "where": tiers.get("where", "auto")},
    }  # fmt: skip
    if args.spare:
        policy["optimizer"]["spare"] = args.spare
    if "nvme" in tiers.values():
        policy["nvme"] = {"paths": [tempfile.mkdtemp(dir=args.disk)]}
    if args.micro_batch:
        policy["activations"] = {"micro_batch": args.micro_batch, "tier": args.activations}
        model.recompute = False  # blocks in micro-batches keep their inputs only
    if args.trace:
        policy["log"] = {"trace": args.trace, "trace_steps": [args.warmup + 1, args.warmup + 2]}
    funicular.offload(model, policy)
    return model, funicular.AdamW(model.parameters(), **HYPER)


def fsdp2(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """PyTorch's own sharding with its CPU offload, on one GPU; fp32 masters on the host."""
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl", init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    model = build(args.size, "cuda").to("cpu").float()
    options = {"offload_policy": CPUOffloadPolicy(), "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return model, torch.optim.AdamW(model.parameters(), fused=True, **HYPER)


SYSTEMS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Any]]] = {
    "in_hbm": in_hbm,
    "auto": offloaded,
    "host": lambda args: offloaded(args, params="host", optimizer="host"),
    "host_cpu": lambda args: offloaded(args, params="host", optimizer="host", where="cpu"),
    "host_gpu": lambda args: offloaded(args, params="host", optimizer="host", where="gpu"),
    "states_nvme": lambda args: offloaded(args, params="host", optimizer="nvme"),
    "nvme": lambda args: offloaded(args, params="nvme", optimizer="nvme"),
    "fsdp2": fsdp2,
}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model, opt = SYSTEMS[name](args)
    torch.cuda.synchronize()
    made = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {
        "system": name,
        "size": args.size,
        "tokens": args.tokens,
        "max_norm": args.max_norm,
        "compiled": args.compile,
    }
    if args.compile:
        for layer in model.layers:
            layer.forward = torch.compile(layer.forward)
    result |= train(args, model, opt)
    flops = SHAPES[args.size].flops(args.tokens, SEQ)
    result |= {"tflops": round(flops / result["seconds"] / 1e12, 1), "setup_s": round(made, 1), "host_gib": host_gib()}
    if name not in ("in_hbm", "fsdp2"):
        result |= facts(model)
    print(json.dumps(result), flush=True)
    del model, opt
    return result


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.35", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=16384, help="per step, a multiple of 2048")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--systems", default="in_hbm,host,auto")
    parser.add_argument("--hbm", default="16GiB", help="budget of the compute tier")
    parser.add_argument("--spare", default="", help="optimizer.spare")
    parser.add_argument("--disk", default="/var/tmp", help="folder for what lives on NVMe")
    parser.add_argument("--trace", default="", help="file for a trace of two steps")
    parser.add_argument("--max-norm", type=float, default=1.0, help="what gradients are clipped to")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows that a block takes at a time; 0: checkpoints")
    parser.add_argument("--activations", default="hbm", choices=["hbm", "host"], help="where block inputs wait then")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    args = parser.parse_args()
    args.vocab = SHAPES[args.size].vocab
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}), flush=True)
    results = [measure(name, args) for name in args.systems.split(",")]
    first = results[0]
    for other in results[1:]:
        apart = max(abs(x - y) for x, y in zip(first["losses"], other["losses"], strict=True))
        ratio = other["tokens_per_s"] / first["tokens_per_s"]
        print(
            json.dumps(
                {"system": other["system"], "of": first["system"], "ratio": round(ratio, 4), "losses_apart": apart}
            )
        )


if __name__ == "__main__":
    main()
