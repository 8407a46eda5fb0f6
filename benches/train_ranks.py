"""Training steps on several GPUs of one host: funicular beside FSDP2 and DeepSpeed, side by side in one run; JSON lines.

``python benches/train_ranks.py --ranks 2 --size 3.14 --tokens 16384,32768@1e9`` on a machine with two GPUs. Tokens are those of each rank, and a
``@norm`` says where gradients are clipped, 1.0 without one. Each system runs under a torchrun of its own, so that one that fails or hangs ends
no other; ``benches/train_step.py`` is what runs. The summary gives each system's tokens per second as a part of FSDP2's with everything in HBM.

``--device host --size toy --seq 64 --tokens 128`` runs the same on the processor, with gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

STEP = Path(__file__).resolve().parent / "train_step.py"
BASE = "fsdp2_hbm"


def run(system: str, args: argparse.Namespace, rest: list[str]) -> list[dict[str, Any]]:
    """The lines of one system, printed as they come; one that says why, if it did not end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
    command = [*launch, STEP, "--systems", system, *rest]
    lines: list[dict[str, Any]] = []

    def note(line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        lines.append(line)

    # In a session of its own, so that its ranks end with it.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        late = threading.Timer(args.limit, os.killpg, (process.pid, signal.SIGKILL))
        late.start()
        for line in process.stdout:
            if line.startswith("{"):
                note(json.loads(line))
        process.wait()
        late.cancel()
    if process.returncode == -signal.SIGKILL:
        note({"system": system, "failed": f"did not end in {args.limit:.0f} s"})
    elif process.returncode:
        note({"system": system, "failed": f"exit code {process.returncode}"})
    return lines


def compare(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each timed workload beside that of the base: a part of its tokens per second, and how far rank 0's losses are apart."""
    timed = [line for line in lines if "tokens_per_s" in line]
    keys = ("tokens", "max_norm", "compiled")
    base = {tuple(line[k] for k in keys): line for line in timed if line["system"] == BASE}
    compared = []
    for line in timed:
        if (other := base.get(tuple(line[k] for k in keys))) is not None:
            apart = max(abs(x - y) for x, y in zip(line["losses"], other["losses"], strict=True))
            found = {"of_base": round(line["tokens_per_s"] / other["tokens_per_s"], 3), "losses_apart": round(apart, 5)}
            compared.append({k: line[k] for k in ("system", "ranks", *keys, "tokens_per_s", "host_gib")} | found)
    return compared


def main() -> None:
    """Run the systems and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--systems", default=f"{BASE},no_policy,host,auto,fsdp2,deepspeed", help="as those of benches/train_step.py"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a system is ended")
    args, rest = parser.parse_known_args()
    lines = [line for system in args.systems.split(",") for line in run(system, args, rest)]
    for line in compare(lines):
        print(json.dumps({"summary": line}), flush=True)


if __name__ == "__main__":
    main()
