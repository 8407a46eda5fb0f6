"""Whether the plan is true: predicted peaks and step times against runs, for ten policies. Prints every pair.

``python benches/plan_truth.py`` on the host device, ``--device cuda --layers 24 --dim 2048 --tokens 16384`` on a GPU. Rates are
measured first, by ``funicular bench --quick``, unless ``--profile`` names them; compute is measured on the same model, resident.
``--again`` measures those of the disk before and after each policy that uses it, ``--pause`` seconds after its files are gone: the
rate of a virtual disk changes, and what is deleted keeps it busy for a while.
Exit code 1 if a predicted peak is below what a run used, or more than 2 % above, or a step time is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funicular

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from transformer import Config, Transformer

SHAPE = "FUNICULAR_TRUTH_SHAPE"
#: the part of a profile that says how fast all disks together are, and a rate in it
NVME, RATE = re.compile(r"^\[nvme\]\n(?:\w+ = .*\n)*", re.MULTILINE), re.compile(r"^(\w+) = (.*)$", re.MULTILINE)


def build() -> nn.Module:
    """The model, also for ``funicular plan``, which calls this on the meta device."""
    vocab, dim, layers, dtype = os.environ[SHAPE].split(",")
    config = Config(
        vocab=int(vocab), dim=int(dim), layers=int(layers), heads=max(1, int(dim) // 64), hidden=3 * int(dim)
    )
    return Transformer(config).to(getattr(torch, dtype))


def built(device: torch.device) -> nn.Module:
    """The model where it is to compute: there its weights are made fastest."""
    with device:
        return build()


def policies(params: int, largest: int, folder: str) -> dict[str, dict[str, Any]]:
    """Ten ways to place ``params`` bytes of parameters in blocks of at most ``largest``; states take some five times as much."""
    host, nvme = {"tier": "host"}, {"tier": "nvme"}
    disk = {"paths": [folder]}

    def size(n: float) -> str:
        return f"{int(n)}B"

    ring = {"hbm": size(3.2 * largest)}
    return {
        "all automatic": {},
        "host, a ring of three": {"budget": ring, "params": host, "optimizer": host},
        "host, a ring of half": {"budget": {"hbm": size(params / 2)}, "params": host, "optimizer": host},
        "host, a ring of all": {"budget": {"hbm": size(1.2 * params)}, "params": host, "optimizer": host},
        "states on NVMe": {"budget": ring, "nvme": disk, "params": host, "optimizer": nvme},
        "parameters on NVMe": {"budget": ring, "nvme": disk, "params": nvme, "optimizer": host},
        "all on NVMe": {"budget": ring, "nvme": disk, "params": nvme, "optimizer": nvme},
        "half of the states on NVMe": {"budget": {**ring, "host": size(3 * params)}, "nvme": disk},
        "some blocks on NVMe": {
            "budget": ring, "nvme": disk, "params": host, "optimizer": host,
            "override": [{"match": "blocks.[0-3]", "params": "nvme", "optimizer": "nvme"}],
        },
        "one thread": {"budget": {**ring, "threads": 1}, "params": host, "optimizer": host},
    }  # fmt: skip


def batch(args: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same tokens every time."""
    ids = torch.randint(args.vocab, (args.tokens // args.seq, args.seq + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].to(device), ids[:, 1:].to(device)


def timed(steps: int, device: torch.device, step: Any) -> float:
    """Median seconds of a step after two that do not count."""
    seconds = []
    for i in range(steps + 2):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) if seconds else 0.0


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One forward."""
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def compute_seconds(args: argparse.Namespace, device: torch.device) -> float:
    """Forward and backward of the resident model."""
    model = built(device)
    x, y = batch(args, device)

    def step() -> None:
        loss_of(model, x, y).backward()
        model.zero_grad()

    return timed(args.steps, device, step)


def planned(policy: Path, profile: Path, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """What ``funicular plan`` says."""
    command = [sys.executable, "-m", "funicular", "plan", f"{Path(__file__).resolve()}:build", "--policy", str(policy),
               "--profile", str(profile), "--compute-seconds", str(seconds), "--json"]  # fmt: skip
    if args.device == "cuda":
        command += ["--gpu", f"{torch.cuda.mem_get_info()[0]}B"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def ran(
    policy: dict[str, Any], args: argparse.Namespace, device: torch.device
) -> tuple[float, dict[str, int], dict[str, int]]:
    """Step time, peaks by tier, and bytes per step by link of a run."""
    model = funicular.offload(built(device), policy)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    opt = funicular.AdamW(model.parameters(), lr=1e-5)
    x, y = batch(args, device)

    def step() -> None:
        loss_of(model, x, y).backward()
        opt.step()
        opt.zero_grad()

    # The order is learned in the first steps; bytes are counted from the third on.
    timed(0, device, step)
    before = funicular.stats(model)
    seconds = timed(args.steps, device, step)
    after = funicular.stats(model)
    steps = after.steps - before.steps
    links = {name: (after.links[name].bytes - before.links[name].bytes) // steps for name in after.links}
    peaks = {tier: budget.peak for tier, budget in after.budgets.items()}
    funicular.unwrap(model)
    return seconds, peaks, links


def bench(args: argparse.Namespace, folder: str, profile: Path) -> None:
    """Measure this machine's rates."""
    command = [sys.executable, "-m", "funicular", "bench", "--quick", "--no-sweep", "--path", folder]
    # The plan is compared with steps on the same machine, beside the same load.
    command += ["--device", args.device, "--save", str(profile), "--force"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def disk_rates(args: argparse.Namespace, folder: str) -> dict[str, float]:
    """Those of the disk alone, as of now."""
    profile = Path(folder) / "again.toml"
    bench(args, folder, profile)
    return {name: float(rate) for name, rate in RATE.findall(NVME.search(profile.read_text())[0])}


def between(profile: Path, before: dict[str, float], after: dict[str, float], folder: str) -> Path:
    """The same rates, but for the disk those of the time between two measurements."""
    lines = [f"{name} = {(before[name] + after[name]) / 2}\n" for name in before]
    file = Path(folder) / "between.toml"
    file.write_text(NVME.sub("[nvme]\n" + "".join(lines), profile.read_text()))
    return file


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"vocab": 256, "dim": 512, "layers": 12, "seq": 128, "tokens": 2048, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="host", choices=["host", "cuda"])
    parser.add_argument("--path", default="/var/tmp", help="a directory on a disk")
    parser.add_argument("--profile", type=Path, help="rates measured before")
    parser.add_argument("--only", default="", help="policies whose names contain one of these, with semicolons between")
    parser.add_argument("--again", action="store_true", help="measure the disk around each policy that uses it")
    parser.add_argument("--pause", type=float, default=8, help="seconds between a run and that")
    args = parser.parse_args()
    os.environ[SHAPE] = f"{args.vocab},{args.dim},{args.layers},{args.dtype}"
    os.environ["FUNICULAR_DEVICE"] = args.device
    device = torch.device("cpu" if args.device == "host" else "cuda")
    with tempfile.TemporaryDirectory(dir=args.path) as folder:
        profile = args.profile or Path(folder) / "profile.toml"
        if args.profile is None:
            bench(args, folder, profile)
        shape = built(torch.device("meta"))
        sizes = [sum(p.nbytes for p in block.parameters()) for block in shape.blocks]
        all_params = sum(p.nbytes for p in shape.parameters())
        print(
            f"{'policy':28}{'seconds':>9}{'planned':>9}{'off':>7}   peaks in MiB, run / planned; bytes per step, run / planned"
        )
        wrong = 0
        disk: dict[str, float] = {}
        for name, policy in policies(all_params, max(sizes), folder).items():
            if not any(part in name for part in args.only.split(";")):
                continue
            file = Path(folder) / "policy.json"
            file.write_text(json.dumps(policy))
            again = args.again and "nvme" in policy
            # Those after one policy are those before the next.
            disk = (disk or disk_rates(args, folder)) if again else {}
            before = compute_seconds(args, device)
            gc.collect()
            seconds, peaks, links = ran(policy, args, device)
            gc.collect()
            compute = (before + compute_seconds(args, device)) / 2
            rates = profile
            if again:
                time.sleep(args.pause)
                after = disk_rates(args, folder)
                rates = between(profile, disk, after, folder)
                print(
                    "disk before and after, 1e9 per second:",
                    *(f"{k} {v / 1e9:.3f} {after[k] / 1e9:.3f}" for k, v in disk.items()),
                )
                disk = after
            wrong += report(name, seconds, peaks, links, planned(file, rates, compute, args))
        print("all true" if wrong == 0 else f"{wrong} wrong")
    return int(wrong > 0)


def report(name: str, seconds: float, peaks: dict[str, int], links: dict[str, int], plan: dict[str, Any]) -> int:
    """Print one row; how many of its figures are wrong."""
    wrong = 0
    cells = []
    for tier in plan["tiers"]:
        most = max(tier[when] for when in ("steady", "init", "step"))
        peak = peaks[tier["tier"]]
        true = peak <= most <= 1.02 * peak + 4096
        wrong += not true
        cells.append(f"{tier['tier']} {peak / 2**20:.1f}/{most / 2**20:.1f}{'' if true else ' WRONG'}")
    moved = dict(plan["traffic"])
    cells += [
        f"{link} {links[link] / 2**20:.1f}/{moved.get(link, 0) / 2**20:.1f}"
        for link in links
        if links[link] or moved.get(link)
    ]
    predicted = plan["step"]["seconds"]
    off = predicted / seconds - 1
    wrong += abs(off) > 0.15
    print(f"{name:28}{seconds:9.3f}{predicted:9.3f}{off:7.1%}   {', '.join(cells)}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
