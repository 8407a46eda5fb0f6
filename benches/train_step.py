"""Training steps: everything in HBM against funicular under several policies, and what others offer; JSON lines.

``python benches/train_step.py --size 3.14 --tokens 16384,32768 --systems in_hbm,host,auto`` on a machine with a GPU. bf16 parameters
with fp32 masters, AdamW, gradients clipped to norm 1.0, every block checkpointed, chunked cross entropy, sequences of 2048; the
same initial weights and the same data for all. A system is set up once and goes through all workloads, so that its weights go on
from one to the next; the losses of all systems are compared. What does not fit is said, and the next system runs.

``--device host --size toy --seq 64 --tokens 128`` runs the same on the processor. Under torchrun all ranks train together, each with
batches of its own of so many tokens; rank 0 prints (``benches/train_ranks.py``).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import funicular
from funicular import testing
from funicular.reference import ReferenceAdamW

sys.path.insert(0, str(Path(__file__).resolve().parent))
from llama import SHAPES, build
from peers import PEERS

HYPER = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
#: This process among those that train together.
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
#: Bytes of HBM per parameter: bf16 weights and gradients; with fp32 masters, moments and gradients beside them.
COMPUTE_BYTES, ADAMW_BYTES = 4, 20


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


class NoUpdate:
    """Forward and backward alone: what a step would take whose update costs nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def step(self) -> None:
        """Leave the weights as they are."""

    def zero_grad(self) -> None:
        self.model.zero_grad()


class Ends:
    """The ends of steps, by the clock of the device."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.ends: list[Any] = []

    def note(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each to the next; all of them have to be over."""
        if self.cuda:
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self.ends)]
        return [b - a for a, b in itertools.pairwise(self.ends)]


def wait(args: argparse.Namespace) -> None:
    """Wait for the device."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def train(args: argparse.Namespace, model: nn.Module, opt: Any, tokens: int, max_norm: float) -> dict[str, Any]:
    """Time steps; the loss is read at the end only, so that the program runs ahead of the GPU as it would in training."""
    generator = torch.Generator().manual_seed(tokens + 1_000_003 * RANK)
    shape = (tokens // args.seq, args.seq + 1)
    count = args.warmup + args.steps
    batches = [torch.randint(args.vocab, shape, generator=generator) for _ in range(count * args.backwards)]
    data = [[ids.to(args.torch_device) for ids in batches[i::count]] for i in range(count)]
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    ends = Ends(args.device)
    enqueued: list[tuple[float, float, float]] = []
    before = totals(model)
    for i, batches in enumerate(data):
        spent = [0.0, 0.0]
        for ids in batches:
            began = time.perf_counter()
            loss = model(ids) / args.backwards
            forward = time.perf_counter()
            getattr(opt, "backward", Tensor.backward)(loss)
            backward = time.perf_counter()
            spent = [spent[0] + forward - began, spent[1] + backward - forward]
        if hasattr(opt, "clip"):
            opt.clip(max_norm)
        elif not isinstance(opt, NoUpdate):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).detach()
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        opt.step()
        if hasattr(opt, "clip"):
            norms.append(opt.norm())
        opt.zero_grad()
        losses.append(loss.detach() * args.backwards)
        ends.note()
        enqueued.append((*spent, time.perf_counter() - backward))
        if i == args.warmup - 1:
            wait(args)
            before = totals(model)
    wait(args)
    after = totals(model)
    seconds = ends.seconds()[args.warmup - 1 :]
    middle = statistics.median(seconds)
    result = {
        "backwards": args.backwards, "seconds": round(middle, 4), "mean": round(statistics.mean(seconds), 4), "fastest": round(min(seconds), 4),
        "slowest": round(max(seconds), 4), "ranks": RANKS, "tokens_per_s": round(RANKS * args.backwards * tokens / middle), "steps": len(seconds),
        "enqueue_s": [round(statistics.median(part), 4) for part in zip(*enqueued[args.warmup :], strict=True)],
        "clipped": sum(float(n) > max_norm for n in norms[args.warmup :]), "losses": [float(x) for x in losses],
        "per_step": {k: round((after[k] - before[k]) / len(seconds) / 1e9, 4) for k in after if after[k] > before[k]},
    }  # fmt: skip
    if args.device == "cuda":
        result["hbm_torch_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return result


def totals(model: nn.Module) -> dict[str, int]:
    """Bytes over each link, and parameters updated, since the beginning; nothing for a model that is not offloaded."""
    if not is_offloaded(model):
        return {}
    stats = funicular.stats(model)
    moved = {name: link.bytes for name, link in stats.links.items()}
    return moved | {"params_by_cpu": stats.updated.cpu, "params_by_gpu": stats.updated.gpu}


def is_offloaded(model: nn.Module) -> bool:
    """Whether funicular has it."""
    return testing.is_offloaded(model)


def host_gib() -> float:
    """Memory that the processes hold, what they share counted once."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    share = torch.tensor(sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:")), dtype=torch.float64)
    if RANKS > 1:
        dist.all_reduce(share)
    return round(float(share) / 2**20, 2)


def facts(model: nn.Module) -> dict[str, Any]:
    """What the runtime counted since the beginning."""
    stats = funicular.stats(model)
    rates = {k: round(v.gb_per_s, 2) for k, v in stats.links.items() if v.bytes}
    return {
        "step_time": None if stats.last is None else vars(stats.last), "lost": stats.lost,
        "stalls": {k: round(v, 3) for k, v in stats.stalls.items()}, "gb_per_s": rates,
        # Of the last step: those before it may have been of another workload.
        "binding": stats.binding if stats.last is None else stats.last.binding,
        "prefetch": vars(stats.prefetch), "ahead": vars(stats.ahead), "updated": vars(stats.updated),
        "home_uses": stats.home_uses, "activations": vars(stats.activations),
        "budgets_gib": {k: round(v.peak / 2**30, 2) for k, v in stats.budgets.items()},
    }  # fmt: skip


def digest(model: nn.Module) -> str:
    """A sum over the bits of all weights that changes with any of them."""
    total = 0
    for p in model.parameters():
        bits = p.detach().reshape(-1).view(torch.int16).long()
        odd = torch.arange(bits.numel(), device=bits.device) * 6364136223846793005 + 1442695040888963407
        total = (total * 31 + int((bits * odd).sum())) % 2**64
    return f"{total:016x}"


class DoesNotFit(Exception):
    """By arithmetic, before anything is tried."""


def built(args: argparse.Namespace, bytes_per_param: int = 0) -> nn.Module:
    """The model on the device, if that much of it fits there."""
    params = SHAPES[args.size].parameters
    if args.device == "cuda" and bytes_per_param:
        free, needed = torch.cuda.mem_get_info()[0], params * bytes_per_param
        if needed > free:
            raise DoesNotFit(
                f"{params / 1e9:.2f} B parameters of {bytes_per_param} bytes are {needed / 2**30:.1f} GiB without activations; "
                f"{free / 2**30:.1f} GiB of HBM are free"
            )
    return build(args.size, args.torch_device)


def in_hbm(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Everything on the GPU."""
    model = built(args, ADAMW_BYTES)
    return model, InMemoryAdamW(model)


def compute(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Weights and gradients on the GPU, no update."""
    model = built(args, COMPUTE_BYTES)
    return model, NoUpdate(model)


def reference(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Everything on the GPU, with the arithmetic of funicular's update in plain torch: the same bits."""
    model = built(args, ADAMW_BYTES)
    return model, ReferenceAdamW(model.parameters(), **HYPER)


def policy_of(args: argparse.Namespace, tiers: dict[str, str]) -> dict[str, Any]:
    """Homes where ``tiers`` says, else where the planner puts them."""
    optimizer = {"tier": tiers.get("optimizer", "auto"), "where": tiers.get("where", "auto")}
    policy: dict[str, Any] = {
        "device": args.device, "budget": {"hbm": args.hbm}, "params": {"tier": tiers.get("params", "auto")},
        "optimizer": optimizer, "gradients": {"tier": tiers.get("gradients", "auto")}, "debug": {"poison": "poison" in tiers, "faults": args.faults},
    }  # fmt: skip
    if args.host:
        policy["budget"]["host"] = args.host
    if args.threads:
        policy["budget"]["threads"] = args.threads
    if args.spare:
        optimizer["spare"] = args.spare
    if "nvme" in tiers.values():
        policy["nvme"] = {"paths": [args.folder]}
    if args.micro_batch:
        policy["activations"] = {"micro_batch": args.micro_batch, "tier": args.activations}
    if args.trace:
        policy["log"] = {"trace": args.trace, "trace_steps": [args.warmup + 1, args.warmup + 2]}
    return policy


def offloaded(args: argparse.Namespace, **tiers: str) -> tuple[nn.Module, Any]:
    """Funicular; the weights are made on the device, as those of the other systems, and move from there to their homes."""
    model = built(args)
    if args.micro_batch:
        model.recompute = False  # blocks in micro-batches keep their inputs only
    funicular.offload(model, None if "nothing" in tiers else policy_of(args, tiers))
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return model, funicular.AdamW(model.parameters(), **HYPER)


SYSTEMS: dict[str, Callable[[argparse.Namespace], tuple[nn.Module, Any]]] = {
    "in_hbm": in_hbm,
    "compute": compute,
    "reference": reference,
    "auto": offloaded,
    "no_policy": lambda args: offloaded(args, nothing="said"),
    "host": lambda args: offloaded(args, params="host", optimizer="host"),
    "host_cpu": lambda args: offloaded(args, params="host", optimizer="host", where="cpu"),
    "host_gpu": lambda args: offloaded(args, params="host", optimizer="host", where="gpu"),
    "host_poison": lambda args: offloaded(args, params="host", optimizer="host", poison="on"),
    "states_nvme": lambda args: offloaded(args, params="host", optimizer="nvme"),
    "nvme": lambda args: offloaded(args, params="nvme", optimizer="nvme"),
    "nvme_gradients": lambda args: offloaded(args, params="nvme", optimizer="nvme", gradients="nvme"),
    "three_tiers": lambda args: offloaded(args, disk="nvme"),
} | {name: lambda args, peer=peer: peer(built(args), HYPER) for name, peer in PEERS.items()}


def say(line: dict[str, Any]) -> None:
    """Print it, once."""
    if RANK == 0:
        print(json.dumps(line), flush=True)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One system: a line per workload."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.ones(1, device="cuda")  # starts CUDA: not part of the set-up
    start = time.perf_counter()
    model, opt = SYSTEMS[name](args)
    wait(args)
    made = round(time.perf_counter() - start, 1)
    results = []
    for (tokens, norm), compiled in [(t, False) for t in args.tokens] + [(t, True) for t in args.compiled]:
        if compiled and not any(r["compiled"] for r in results):
            for layer in model.layers:
                # One program for each size: a dynamic one would be slower.
                layer.forward = torch.compile(layer.forward, dynamic=False)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = {
            "system": name,
            "size": args.size,
            "params": SHAPES[args.size].parameters,
            "tokens": tokens,
            "compiled": compiled,
            "max_norm": norm,
        }
        result |= {"hbm": args.hbm, "micro_batch": args.micro_batch, "setup_s": made}
        # Systems that made other numbers of steps before have other weights, so other losses.
        result["steps_before"] = len(results) * (args.warmup + args.steps)
        result |= train(args, model, opt, tokens, norm)
        flops = args.backwards * SHAPES[args.size].flops(tokens, args.seq)
        result |= {"tflops": round(flops / result["seconds"] / 1e12, 1), "host_gib": host_gib()}
        if is_offloaded(model):
            result |= facts(model)
        if args.digest:
            result["digest"] = digest(model)
        say(result)
        results.append(result)
    return results


def attempt(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """As ``measure``; what is refused, or fails, is a line too."""
    line: dict[str, Any] = {"system": name, "size": args.size, "tokens": [t for t, _ in args.tokens], "hbm": args.hbm}
    try:
        return measure(name, args)
    except (DoesNotFit, funicular.BudgetError) as error:
        say(line | {"does_not_fit": str(error)})
    except ModuleNotFoundError as error:
        say(line | {"skipped": f"{error.name} is not installed"})
    except Exception as error:
        say(line | {"failed": f"{type(error).__name__}: {error}"})
    finally:
        gc.collect()
    return []


def compare(results: list[dict[str, Any]]) -> None:
    """Each result beside the first system's of the same workload."""
    first: dict[Any, dict[str, Any]] = {}
    for result in results:
        one = first.setdefault((result["tokens"], result["max_norm"], result["compiled"]), result)
        if one is not result:
            apart = max(abs(x - y) for x, y in zip(one["losses"], result["losses"], strict=True))
            line = {k: result[k] for k in ("system", "size", "tokens", "compiled")} | {"of": one["system"]}
            say(line | {"ratio": round(result["tokens_per_s"] / one["tokens_per_s"], 4), "losses_apart": apart})


def workloads(text: str) -> list[tuple[int, float]]:
    """``16384,8192@1e9`` as tokens of a backward and the norm that gradients are clipped to, 1 where none is said."""
    parts = [part.partition("@") for part in text.split(",") if part]
    return [(int(tokens), float(norm or 1)) for tokens, _, norm in parts]


def join(args: argparse.Namespace) -> None:
    """Meet the other ranks, each on its device with its part of the cores: torchrun gives each rank one thread."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // RANKS))
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.35", choices=SHAPES)
    parser.add_argument(
        "--tokens",
        type=workloads,
        default="16384",
        help="per backward, multiples of --seq: a workload each; @NORM: clipped to it",
    )
    parser.add_argument("--compiled", type=workloads, default="", help="workloads after those, with compiled blocks")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--warmup", type=int, default=8, help="steps of each workload that do not count")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backwards", type=int, default=1, help="of so many tokens each, in a step")
    parser.add_argument("--systems", default="in_hbm,host,auto", help=", ".join(SYSTEMS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "host"])
    parser.add_argument("--hbm", default="16GiB", help="budget of the compute tier")
    parser.add_argument("--host", default="", help="budget of host memory")
    parser.add_argument("--threads", type=int, default=0, help="budget.threads")
    parser.add_argument("--spare", default="", help="optimizer.spare")
    parser.add_argument("--disk", default="/var/tmp", help="folder for what lives on NVMe")
    parser.add_argument("--trace", default="", help="file for a trace of two steps")
    parser.add_argument("--faults", default="", help="debug.faults; states:delay=0ms makes weights first in every step")
    parser.add_argument("--micro-batch", type=int, default=0, help="rows that a block takes at a time; 0: checkpoints")
    parser.add_argument("--activations", default="hbm", choices=["hbm", "host"], help="where block inputs wait then")
    parser.add_argument("--digest", action="store_true", help="tell the bits of all weights after each workload")
    parser.add_argument("--deterministic", action="store_true", help="kernels that give the same bits every time")
    args = parser.parse_args()
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if RANKS > 1:
        join(args)
    args.vocab, args.torch_device = SHAPES[args.size].vocab, "cuda" if args.device == "cuda" else "cpu"
    args.folder = tempfile.mkdtemp(prefix="train-step-", dir=args.disk)
    try:
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
        say({"gpu": gpu, "torch": torch.__version__})
        compare([line for name in args.systems.split(",") for line in attempt(name, args)])
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
