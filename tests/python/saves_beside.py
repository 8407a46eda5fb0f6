"""Processes that save to one path and beside each other, sweep, and read meanwhile: ``saves_beside.py [ROUNDS]``."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent)]

import children
import funicular

SAVER = """
    import torch, funicular
    from torch import nn
    model = nn.Linear(256, 256)
    base, number, rounds = {base!r}, {number}, {rounds}
    for k in range(rounds):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(number * 1000 + k)
        funicular.save(model, None, base + "/last", overwrite=True, extra=number * 1000 + k, shard_bytes=1000)
        funicular.save(model, None, base + f"/own-{{number}}-{{k}}", keep=2)
    print("saved")
"""
READER = """
    import os, torch, funicular
    from torch import nn
    model, base, seen, reads = nn.Linear(256, 256), {base!r}, set(), 0
    open(base + "/ready-{number}", "w").close()
    while not os.path.exists(base + "/stop"):
        value = funicular.load(base + "/last", model).extra
        assert all(bool((p == value).all()) for p in model.parameters()), value
        seen.add(value)
        reads += 1
    print(reads, len(seen))
"""


def campaign(base: Path, rounds: int, savers: int = 3, readers: int = 2) -> tuple[int, int]:
    """Savers into one path and beside it, sweeping, and readers: no error, each load one state. Reads, and states seen."""
    model = nn.Linear(256, 256)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(-1)
    funicular.save(model, None, base / "last", extra=-1)
    reading = [children.start(READER.format(base=str(base), number=n), "", {}, "host") for n in range(readers)]
    while any(not (base / f"ready-{n}").exists() for n in range(readers)):
        assert all(process.poll() is None for process in reading), [process.communicate() for process in reading]
        time.sleep(0.05)
    saving = [
        children.start(SAVER.format(base=str(base), number=n, rounds=rounds), "", {}, "host") for n in range(savers)
    ]
    try:
        for process in saving:
            status, out, err = children.finish(process, 600)
            assert (status, out) == (0, "saved\n"), err
    finally:
        (base / "stop").touch()
        ends = [children.finish(process, 60) for process in reading]
    assert all(status == 0 for status, _, _ in ends), ends
    for name in ("stop", *(f"ready-{n}" for n in range(readers))):
        (base / name).unlink()
    expected = {"last", *(f"own-{n}-{k}" for n in range(savers) for k in range(max(rounds - 2, 0), rounds))}
    assert set(os.listdir(base)) == expected
    counts = [tuple(map(int, out.split())) for _, out, _ in ends]
    return sum(reads for reads, _ in counts), sum(seen for _, seen in counts)


if __name__ == "__main__":
    base = Path(tempfile.mkdtemp(prefix="funicular-beside-", dir=os.environ.get("FUNICULAR_TEST_DIR", "/var/tmp")))
    try:
        reads, seen = campaign(base, int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(f"{reads} loads beside three savers: each of one state, {seen} states seen, every save whole")
