"""Train a byte-level transformer with most of its state out of the compute tier, then prove that nothing changed.

The text is the source code of Python's standard library. The compute tier may hold a quarter of the parameters, and the
host budget leaves part of the Adam states on disk. The same steps then run resident, with the project's reference
optimizer in plain PyTorch: losses and final weights have to be equal to the last bit. Exit status 1 if they are not, or
if a budget was exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funicular
from funicular.reference import ReferenceAdamW
from transformer import Config, Transformer

HYPER = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
CORPUS_BYTES = 32 << 20
PROGRESS_EVERY = 5  # steps
SPEED_STEPS = 10  # of the plain run whose speed is compared; the first two are left out
MIB = 1 << 20


@dataclass
class Run:
    """What one training run gave: a loss and a duration in seconds per step."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def tokens_per_second(self, tokens: int) -> float:
        """Speed of the median step; the first two steps only warm up."""
        return tokens / statistics.median(self.seconds[2:] or self.seconds)


def say(text: str = "") -> None:
    """Print one line at once, wherever the output goes, over a status line if there is one."""
    print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)


def status(text: str) -> None:
    """Show a line that the next one replaces; nothing where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def corpus(seed: int) -> Tensor:
    """The standard library's source files, in an order that depends on the seed only, as bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = sorted(path for path in root.rglob("*.py") if not skip.intersection(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    text = bytearray()
    for path in files:
        if len(text) >= CORPUS_BYTES:
            break
        text += path.read_bytes()
    if len(text) < MIB:
        raise SystemExit(f"error: only {len(text)} bytes of Python source under {root}; is the standard library there?")
    return torch.frombuffer(text, dtype=torch.uint8)


def batches(text: Tensor, args: argparse.Namespace, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows of the text for the same seed: inputs, and targets one byte later."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.steps):
        starts = torch.randint(len(text) - args.seq - 1, (args.batch,), generator=generator)
        rows = torch.stack([text[start : start + args.seq + 1] for start in starts.tolist()]).long().to(device)
        yield rows[:, :-1], rows[:, 1:]


def build(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The same model for the same seed."""
    torch.manual_seed(args.seed)
    return Transformer(Config(layers=args.layers)).to(device=device, dtype=dtype)


def on_disk(path: Path) -> bool:
    """Whether a folder can be written and does not lie in memory."""
    if not (path.is_dir() and os.access(path, os.W_OK)):
        return False
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(len(point), kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(inside)[1] not in {"tmpfs", "ramfs", "devtmpfs"}


def disk_folder(wanted: Path | None) -> Path:
    """Where the disk tier goes: as asked for, or the first usual folder that is not in memory."""
    if wanted is not None:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted
    candidates = [Path("/var/tmp"), Path(tempfile.gettempdir()), Path.cwd(), Path.home()]
    for path in candidates:
        if on_disk(path):
            return path
    raise SystemExit("error: no folder on a disk found for the Adam states. Name one: --disk /path/to/folder")


def policy(model: nn.Module, device: torch.device, folder: Path) -> str:
    """A policy that does not hold the model: a quarter of it in the compute tier, half of the Adam moments on disk."""
    count = sum(p.numel() for p in model.parameters())
    param = sum(p.numel() * p.element_size() for p in model.parameters())
    grad = param
    remainder = 0 if param == 4 * count else 2 * count  # the low half of the fp32 master
    moments = 8 * count
    adam = moments + remainder
    say(f"states: parameters {param / MIB:.1f} MiB, gradients {grad / MIB:.1f} MiB, Adam {adam / MIB:.1f} MiB")
    return f"""\
device = "{"cuda" if device.type == "cuda" else "host"}"

[budget]
hbm = "{param // 4}B"  # a quarter of the parameters
host = "{param + grad + remainder + moments // 2}B"  # everything but half of the Adam moments
nvme = "{moments + moments // 8}B"

[nvme]
paths = [{json.dumps(str(folder))}]
"""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Iterator[tuple[Tensor, Tensor]],
    report: Callable[[Run], None],
) -> Run:
    """The ordinary loop; nothing in it knows where the parameters live."""
    run = Run()
    start = time.perf_counter()
    for x, y in data:
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        now = time.perf_counter()
        run.seconds.append(now - start)
        start = now
        report(run)
    return run


class Progress:
    """Prints a line every few steps: loss, speed, and what each link moved since the last line."""

    def __init__(self, args: argparse.Namespace, model: nn.Module | None = None) -> None:
        self.steps, self.tokens, self.model = args.steps, args.batch * args.seq, model
        self.links: dict[str, tuple[int, float]] = {}

    def __call__(self, run: Run) -> None:
        done = len(run.losses)
        recent = run.seconds[-PROGRESS_EVERY:]
        speed = self.tokens * len(recent) / sum(recent)
        line = f"step {done:4}/{self.steps}  loss {run.losses[-1]:.4f}  {speed:8,.0f} tokens/s"
        if done % PROGRESS_EVERY and done not in (1, self.steps):
            status(line)
        else:
            say(line + self.rates())

    def rates(self) -> str:
        if self.model is None:
            return ""
        parts = []
        for name, link in funicular.stats(self.model).links.items():
            moved, busy = self.links.get(name, (0, 0.0))
            self.links[name] = (link.bytes, link.seconds)
            if link.bytes > moved and link.seconds > busy:
                parts.append(f"{name} {(link.bytes - moved) / (link.seconds - busy) / 1e9:.1f}")
        return "  GB/s: " + ", ".join(parts) if parts else ""


def show_budgets(stats: funicular.Stats) -> bool:
    """Print each tier's peak against its limit; False if one was exceeded."""
    say(f"\n{'budget':<16}{'limit':>12}{'peak':>12}")
    fits = True
    for tier, budget in stats.budgets.items():
        if budget.limit is None:
            say(f"{tier:<16}{'none':>12}{budget.peak / MIB:>8.1f} MiB")
            continue
        over = budget.peak > budget.limit
        fits = fits and not over
        say(f"{tier:<16}{budget.limit / MIB:>8.1f} MiB{budget.peak / MIB:>8.1f} MiB{'   EXCEEDED' if over else ''}")
    return fits


def show_time(stats: funicular.Stats) -> None:
    """Print where the time of the steps went, what the links moved, and how the prefetch did."""
    if stats.step is not None:
        say(f"\n{'mean of ' + str(stats.timed) + ' steps':<24}{'seconds':>10}{'share':>8}")
        rows = {"compute": stats.step.compute, **{f"stall: {cause}": s for cause, s in stats.step.stalls.items()}}
        for name, seconds in rows.items():
            say(f"{name:<24}{seconds:>10.4f}{seconds / stats.step.seconds:>8.1%}")
        say(f"bound by {stats.binding}")
    say(f"\n{'link':<24}{'GB':>10}{'GB/s while busy':>18}")
    for name, link in stats.links.items():
        say(f"{name:<24}{link.bytes / 1e9:>10.2f}{link.gb_per_s:>18.2f}")
    p = stats.prefetch
    say(f"\nprefetch: {p.hits} hits, {p.late} late, {p.demand} on demand, {p.conflicts} used from home")


def differs(ours: list[float], theirs: list[float]) -> float:
    """Largest difference of two loss curves; infinite if they have no common length or are not numbers."""
    if len(ours) != len(theirs) or any(x != x for x in (*ours, *theirs)):
        return float("inf")
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def compare(
    args: argparse.Namespace, device: torch.device, text: Tensor, offloaded: Run, weights: list[Tensor]
) -> bool:
    """Run the same steps resident, compare every loss and every weight; False if any differs."""
    say("\n--- the same steps, resident, with the reference optimizer")
    model = build(args, device, weights[0].dtype)
    resident = train(model, ReferenceAdamW(model.parameters(), **HYPER), batches(text, args, device), Progress(args))
    loss = differs(offloaded.losses, resident.losses)
    changed = sum(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))

    say("\n--- plain PyTorch, resident, with its fused AdamW, for the speed only")
    short = argparse.Namespace(**{**vars(args), "steps": min(args.steps, SPEED_STEPS)})
    plain = train(
        model, torch.optim.AdamW(model.parameters(), **HYPER, fused=True), batches(text, short, device), Progress(short)
    )

    tokens = args.batch * args.seq
    ours, theirs = offloaded.tokens_per_second(tokens), plain.tokens_per_second(tokens)
    say(f"\nlargest difference of the loss curves over {args.steps} steps: {loss!r}")
    say(f"weight tensors that differ after the last step: {changed} of {len(weights)}")
    say(f"speed: offloaded {ours:,.0f} tokens/s, plain {theirs:,.0f} tokens/s, ratio {ours / theirs:.2f}")
    return loss == 0.0 and changed == 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; what is not given depends on the device."""
    parser = argparse.ArgumentParser(
        description="Train a transformer that does not fit, and prove that nothing changed."
    )
    parser.add_argument("--steps", type=int, help="training steps (default: 75)")
    parser.add_argument("--batch", type=int, help="sequences per step (default: 4; on a GPU 16)")
    parser.add_argument("--seq", type=int, help="bytes per sequence (default: 128; on a GPU 512)")
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks (default: 12, 41 M parameters)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--disk", type=Path, help="folder for the disk tier (default: the first usual one on a disk)")
    parser.add_argument("--no-compare", action="store_true", help="leave out the runs without offload")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = args.device.startswith("cuda")
    args.steps = 75 if args.steps is None else args.steps
    args.batch = (16 if gpu else 4) if args.batch is None else args.batch
    args.seq = (512 if gpu else 128) if args.seq is None else args.seq
    for name in ("steps", "batch", "seq", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status says whether it kept its promises."""
    args = parse(argv)
    device = torch.device(args.device)
    dtype = torch.float32
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = torch.bfloat16
    text = corpus(args.seed)
    model = build(args, device, dtype)
    count = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    say(f"{count / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')}, on {name}")
    say(f"text: {len(text) / MIB:.1f} MiB of Python source; {args.steps} steps of {args.batch} x {args.seq} bytes")

    # Flash attention where there is one: the other fused kernels do not give the same bits twice.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with (
        tempfile.TemporaryDirectory(prefix="funicular-demo-", dir=disk_folder(args.disk)) as folder,
        sdpa_kernel(kernels),
    ):
        path = Path(folder) / "policy.toml"
        path.write_text(policy(model, device, Path(folder)))
        say(f"\n{path}:\n" + "".join(f"    {line}\n" for line in path.read_text().splitlines()))

        say("--- offloaded")
        model = funicular.offload(model, str(path))
        optimizer = funicular.AdamW(model.parameters(), **HYPER)
        run = train(model, optimizer, batches(text, args, device), Progress(args, model))
        stats = funicular.stats(model)
        model = funicular.unwrap(model)
        weights = [p.detach().clone() for p in model.parameters()]
        del model, optimizer

        equal = args.no_compare or compare(args, device, text, run, weights)
    show_time(stats)
    fits = show_budgets(stats)
    if args.no_compare:
        say(f"\nspeed: offloaded {run.tokens_per_second(args.batch * args.seq):,.0f} tokens/s")
    verdict = [] if equal else ["the offloaded run differs from the resident one"]
    verdict += [] if fits else ["a budget was exceeded"]
    compared = "" if args.no_compare else "every loss and every weight is equal to the last bit, and "
    say("\n" + ("FAILED: " + " and ".join(verdict) if verdict else f"OK: {compared}every budget was kept"))
    return 1 if verdict else 0


if __name__ == "__main__":
    sys.exit(main())
