"""Checkpoints: rates as ratios to the disk's, what a save costs the steps beside it, and torch's ways of saving; JSON lines.

``python benches/checkpoint.py --dir /mnt/nvme0 --millions 500 --places host,nvme`` on a quiet machine. Beside each round
fio does the same work (a new file of the same size, durable at the end; reading it once; both at once), and ``funicular bench`` gives the
rates of a file that is there already, so that each ratio is of one minute. Everything is made durable: ``torch.save`` and
``torch.distributed.checkpoint`` are followed by ``fsync``, as ``funicular.save`` does itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import funicular

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fresh_memory import touch

PLACES = {
    "host": {"params": {"tier": "host"}, "optimizer": {"tier": "host"}},
    "nvme": {"params": {"tier": "nvme"}, "optimizer": {"tier": "nvme"}},
    "states on nvme": {"params": {"tier": "host"}, "optimizer": {"tier": "nvme"}},
}


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """So many parameters, in blocks of two square matrices."""

    def __init__(self, millions: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(Block(width) for _ in range(max(2, round(millions * 1e6 / (2 * width * width)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def bench_rates(args: argparse.Namespace) -> dict[str, float]:
    """Bytes per second that the disk reads and writes in a file that is there already, as ``funicular bench`` finds them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rates.json")
        words = ["bench", "--path", args.dir, "--device", "host", "--quick", "--no-sweep", "--json", str(file)]
        subprocess.run([sys.executable, "-m", "funicular", *words], check=True, capture_output=True)
        hops = json.loads(file.read_text())["hops"]
    return {
        h["name"].removeprefix("nvme_"): h["figure"]["bytes_per_second"]
        for h in hops
        if h["name"].startswith("nvme_") and h["figure"]
    }


def fio_rates(args: argparse.Namespace, size: int) -> dict[str, float]:
    """Bytes per second of fio with a checkpoint's work: a new file of that size, durable at the end; read once; and both at once."""
    rates = {}
    # On a virtual disk requests from small pages are split; our buffers are on huge ones, and fio's shall be too.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    with tempfile.TemporaryDirectory(prefix="funicular-bench-", dir=args.dir) as folder:
        words = [
            "fio",
            "--ioengine=io_uring",
            "--direct=1",
            "--bs=1M",
            "--iodepth=32",
            f"--size={size}",
            "--output-format=json",
        ]
        write = ["--name=write", "--rw=write", "--fallocate=posix", "--end_fsync=1"]
        read = ["--name=read", "--rw=read", f"--filename={folder}/first"]
        for what, jobs in {
            "write": [*write, f"--filename={folder}/first"],
            "read": read,
            "both": [*read, *write, f"--filename={folder}/second"],
        }.items():
            out = subprocess.run([*words, *jobs], check=True, capture_output=True, text=True, env=environment).stdout
            found = {job["jobname"]: job for job in json.loads(out[out.index("{") :])["jobs"]}
            rates[what] = min(job[name]["bw_bytes"] for name, job in found.items())
    return rates


class Training:
    """A model at work, and places to save it to."""

    def __init__(self, args: argparse.Namespace, place: str | None) -> None:
        self.args = args
        self.base = Path(tempfile.mkdtemp(prefix="funicular-bench-", dir=args.dir))
        self.model: nn.Module = Model(args.millions, args.width)
        for p in self.model.parameters():
            nn.init.normal_(p, std=0.01)
        self.device = torch.device("cuda" if args.device == "cuda" else "cpu")
        if place is None:
            self.model.to(self.device)
            self.opt: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        else:
            policy: dict[str, Any] = {
                "device": args.device,
                "nvme": {"paths": [str(self.base)]},
                "log": {"level": "warning"},
            }
            policy |= PLACES[place]
            if args.hbm:
                policy["budget"] = {"hbm": args.hbm}
            funicular.offload(self.model, policy)
            self.opt = funicular.AdamW(self.model.parameters(), lr=1e-4)
        self.x = torch.randn(args.rows, args.width, device=self.device, dtype=torch.bfloat16)
        self.count = 0

    def step(self) -> float:
        start = time.perf_counter()
        self.model(self.x).float().square().mean().backward()
        self.opt.step()
        self.opt.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def path(self) -> Path:
        self.count += 1
        return self.base / f"c{self.count}"

    def close(self) -> None:
        self.model = self.opt = None
        gc.collect()
        shutil.rmtree(self.base, ignore_errors=True)


def size_of(path: Path) -> int:
    """Bytes of all files below a path."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def durable(path: Path) -> None:
    """What an honest comparison needs: the bytes on the disk."""
    for file in [path, *path.rglob("*")]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def timed(action: Callable[..., Any], *args: Any) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action(*args)
    return time.perf_counter() - start


def quiet(args: argparse.Namespace) -> None:
    """Let the disk finish with what was deleted: file systems tell it of every block, in the background."""
    os.sync()
    time.sleep(args.pause)


def say(**facts: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}), flush=True)


def waited_for(args: argparse.Namespace, place: str) -> None:
    """Saves and loads that are waited for, against the disk's rates of the same minute.

    What lies on NVMe is read and written at once: there the limit is what fio reaches with both.
    """
    t = Training(args, place)
    t.step()
    # Not counted: it waits for the step's update, and touches memory for the first time.
    funicular.save(t.model, t.opt, t.path())
    shutil.rmtree(t.base / f"c{t.count}")
    both = PLACES[place]["optimizer"]["tier"] == "nvme"
    for _ in range(args.rounds):
        path = t.path()
        quiet(args)
        save = timed(funicular.save, t.model, t.opt, path)
        size = size_of(path)
        verified = timed(funicular.load, path, t.model, t.opt)
        facts: dict[str, Any] = {} if both else {"fresh_memory_gb_s": size / touch(size) / 1e9}
        fresh = Training(args, place)
        load = timed(funicular.load, path, fresh.model, fresh.opt)
        fresh.close()
        shutil.rmtree(path)
        facts |= {
            "what": "sync", "place": place, "gb": size / 1e9, "save_s": save, "save_gb_s": size / save / 1e9,
            "load_s": load, "load_gb_s": size / load / 1e9, "verified_load_s": verified,
        }  # fmt: skip
        if shutil.which("fio"):
            quiet(args)
            rates = fio_rates(args, size)
            facts |= {f"fio_{what}": rate / 1e9 for what, rate in rates.items()}
            facts["save_of_fio"] = size / save / rates["both" if both else "write"]
            facts["load_of_fio"] = size / load / rates["both" if both else "read"]
        if not args.no_bench:
            hot = bench_rates(args)
            facts["save_of_bench"] = size / save / hot["write"]
            facts["load_of_bench"] = size / load / hot["read"]
        say(**facts)
    t.close()


def beside(args: argparse.Namespace, place: str) -> None:
    """Steps during saves against steps without, in turns; and how long the call takes."""
    t = Training(args, place)
    t.step(), t.step()
    alone, during, calls, whole = [], [], [], []
    for _ in range(args.rounds):
        alone += [t.step() for _ in range(args.steps)]
        path = t.path()
        start = time.perf_counter()
        handle = funicular.save(t.model, t.opt, path, wait=False)
        calls.append(time.perf_counter() - start)
        while not handle.done():
            during.append(t.step())
        handle.wait()
        whole.append(time.perf_counter() - start)
        shutil.rmtree(path)
    normal = statistics.median(alone)
    say(
        what="async", place=place, step_s=normal, steps_during=len(during), during_s=statistics.median(during),
        ratio=statistics.median(during) / normal, mean_ratio=statistics.mean(during) / statistics.mean(alone),
        call_ms=1000 * statistics.median(calls), call_allowed_ms=10 * normal + 5, save_s=statistics.median(whole),
    )  # fmt: skip
    t.close()


def torchs(args: argparse.Namespace) -> None:
    """``torch.save``, and ``torch.distributed.checkpoint``'s asynchronous save, of a resident model with the same parameters."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    t = Training(args, None)
    t.step()

    def state() -> dict[str, Any]:
        return {"model": t.model.state_dict(), "opt": t.opt.state_dict()}

    def write_all(path: Path) -> None:
        torch.save(state(), path / "all.pt")
        durable(path)

    for _ in range(args.rounds):
        path = t.path()
        path.mkdir()
        write = timed(write_all, path)
        size = size_of(path)
        load = timed(torch.load, path / "all.pt")
        say(what="torch.save", gb=size / 1e9, save_s=write, save_gb_s=size / write / 1e9, load_cached_s=load)
        shutil.rmtree(path)
    dist.init_process_group("gloo", init_method=f"file://{t.base}/rendezvous", rank=0, world_size=1)
    for _ in range(args.rounds):
        alone = [t.step() for _ in range(args.steps)]
        path = t.path()
        start = time.perf_counter()
        future = dcp.async_save(state(), checkpoint_id=str(path))
        call = time.perf_counter() - start
        during = []
        while not future.done():
            during.append(t.step())
        future.result()
        durable(path)
        whole = time.perf_counter() - start
        ratio = statistics.median(during) / statistics.median(alone) if during else float("nan")
        say(
            what="dcp.async_save",
            gb=size_of(path) / 1e9,
            call_ms=1000 * call,
            save_s=whole,
            ratio=ratio,
            steps_during=len(during),
        )
        shutil.rmtree(path)
    dist.destroy_process_group()
    t.close()


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="/var/tmp", help="a directory on the disk")
    parser.add_argument("--millions", type=int, default=60, help="parameters, of 12 bytes each")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps without a save, per round")
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--device", default="host")
    parser.add_argument("--hbm", default="", help="budget of the compute tier")
    parser.add_argument("--pause", type=float, default=3, help="seconds after files were deleted")
    parser.add_argument("--no-bench", action="store_true", help="leave out the rates of funicular bench")
    parser.add_argument("--what", default="sync,async,torch")
    args = parser.parse_args()
    torch.manual_seed(0)
    for place in args.places.split(","):
        if "sync" in args.what.split(","):
            waited_for(args, place)
        if "async" in args.what.split(","):
            beside(args, place)
    if "torch" in args.what.split(","):
        torchs(args)


if __name__ == "__main__":
    main()
