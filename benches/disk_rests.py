"""When a disk rests in the steps of a trace: the longest gaps between its reads and writes, what it moved, and how fast.

``python benches/train_step.py --size 3.14 --tokens 16384 --systems states_nvme,nvme,nvme_gradients --disk DIR --trace trace.json``
writes a trace of its last system's third and fourth step; ``python benches/disk_rests.py trace.json`` looks at it. One JSON line a step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

#: Gaps shorter than this are no rest.
REST_MS = 5.0


def rests(busy: list[tuple[float, float]], begin: float, end: float) -> list[tuple[float, float]]:
    """Return the gaps between intervals, from ``begin`` to ``end``."""
    found, at = [], begin
    for start, stop in sorted(busy):
        if start > at:
            found.append((at, min(start, end)))
        at = max(at, stop)
        if at >= end:
            return found
    return [*found, (at, end)]


def step(slices: list[dict[str, Any]], begin: float, end: float) -> dict[str, Any]:
    """Return what the disk did in one step; times of the trace are microseconds."""
    inside = [s for s in slices if s["ts"] < end and s["ts"] + s["dur"] > begin]
    busy = [(s["ts"], s["ts"] + s["dur"]) for s in inside]
    gaps = rests(busy, begin, end)
    seconds = (end - begin) / 1e6
    moved = {
        way: sum(s["args"]["bytes"] for s in inside if s["cat"] == f"nvme {way}") / 1e9 for way in ("read", "write")
    }
    long = [((a - begin) / 1e3, (b - a) / 1e3) for a, b in gaps if (b - a) / 1e3 > REST_MS]
    return {
        "seconds": round(seconds, 4),
        "busy": round(1 - sum(b - a for a, b in gaps) / (end - begin), 4),
        "longest_rest_ms": round(max(((b - a) / 1e3 for a, b in gaps), default=0.0), 2),
        "rests_ms": [(round(at, 1), round(long_, 1)) for at, long_ in sorted(long, key=lambda r: -r[1])[:8]],
        "gb": {way: round(value, 3) for way, value in moved.items()},
        "gb_per_s": round(sum(moved.values()) / seconds, 3),
    }


def main() -> None:
    """Print a line for each step of a trace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    events = json.loads(parser.parse_args().trace.read_text())["traceEvents"]
    slices = [e for e in events if e.get("ph") == "X"]
    disk = [s for s in slices if s["cat"].startswith("nvme ")]
    for one in sorted((s for s in slices if s["cat"] == "steps"), key=lambda s: s["ts"]):
        print(json.dumps({"step": one["name"]} | step(disk, one["ts"], one["ts"] + one["dur"])))


if __name__ == "__main__":
    main()
