"""funicular's CPU AdamW beside torch's fused fp32 AdamW: same threads, same machine, one step of each in turn.

Build first: cargo bench --bench adamw --no-run. Then: python benches/adamw_vs_torch.py
What counts are ratios: the median over neighbouring steps, and that of the best steps (of many, on a busy machine).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

TRAFFIC = {"bf16": 26, "f16": 30, "f32": 28}
"""DRAM bytes per parameter: everything read and written, the gradient only read."""
TORCH_TRAFFIC = 28


def newest_bench() -> Path:
    """The bench executable that cargo built last."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    built = [p for p in target.glob("release/deps/adamw-*") if os.access(p, os.X_OK) and p.suffix == ""]
    if not built:
        sys.exit("build it first: cargo bench --bench adamw --no-run")
    return max(built, key=lambda p: p.stat().st_mtime)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mi", type=int, default=64, help="elements in Mi")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtypes", nargs="+", default=list(TRAFFIC))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    count = args.mi << 20

    env = dict(os.environ, ADAMW_LINE="1", ADAMW_MI=str(args.mi), ADAMW_THREADS=str(args.threads))
    ours = subprocess.Popen([newest_bench()], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert ours.stdin is not None
    assert ours.stdout is not None

    param = torch.nn.Parameter(torch.full((count,), 0.01))
    param.grad = torch.full((count,), 0.01)
    optimizer = torch.optim.AdamW([param], fused=True)
    optimizer.step()
    print(ours.stdout.readline().strip(), "| torch", torch.__version__, torch.backends.cpu.get_cpu_capability())

    times: dict[str, list[float]] = {name: [] for name in ("torch", *args.dtypes)}
    for _ in range(args.rounds):
        start = time.perf_counter()
        optimizer.step()
        times["torch"].append(time.perf_counter() - start)
        for name in args.dtypes:
            ours.stdin.write(name + "\n")
            ours.stdin.flush()
            times[name].append(float(ours.stdout.readline()))
    ours.stdin.close()
    ours.wait()

    for name, seconds in times.items():
        traffic = TRAFFIC.get(name, TORCH_TRAFFIC)
        median = statistics.median(seconds)
        line = f"{name:6} {traffic} B: {count / median / 1e9:5.2f} Gparam/s {count * traffic / median / 1e9:6.1f} GB/s"
        ratios = [traffic / s * t / TORCH_TRAFFIC for s, t in zip(seconds, times["torch"], strict=True)]
        best = traffic / min(seconds) * min(times["torch"]) / TORCH_TRAFFIC
        print(f"{line}  bytes/s against torch: median of pairs {statistics.median(ratios):.2f}, best steps {best:.2f}")


if __name__ == "__main__":
    main()
