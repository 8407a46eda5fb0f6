"""Several ranks for longer: ranks killed at random moments, and every kind of training at 2 to 4 ranks: ``ranks_soak.py [KILLS] [SEED]``.

A killed rank must be a named error on every other rank, and what was saved must be whole and load anywhere.
"""

from __future__ import annotations

import itertools
import json
import pickle
import random
import sys
import tempfile
import time
from pathlib import Path

import children

sys.path[:0] = children.FOLDERS

import torch
from rank_checks import offloaded

import funicular
import several
from twin import World

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: a rank that is killed while ranks find each other is told of by torch's own connections
NAMED = {"FN-E701", "FN-E721"}


def matrix(world: World) -> int:
    """Every kind of training on 2 to 4 ranks; how many."""
    count = 0
    kinds = [
        {"model": "wide"},
        {"model": "decoder", "tie": True},
        {"model": "decoder", "matmul": True, "ckpt": "reentrant"},
        {"model": "decoder", "ckpt": "saved_tensors"},
    ]
    for size, dtype, accumulate, kind in itertools.product([2, 3, 4], DTYPES, [1, 4], kinds):
        clip, to_none = random.choice([0.0, 0.05, 1e9]), random.random() < 0.5
        options = kind | {"dtype": dtype, "accumulate": accumulate, "clip": clip, "to_none": to_none}
        print(f"{size} ranks, {options}", flush=True)
        several.compare("rank_scripts:train", size, world, **options)
        count += 1
    for size, script in itertools.product(
        [2, 3, 4], ["skipping", "two_optimizers", "looking", "cleared", "between", "differentiating", "experts"]
    ):
        several.compare(f"rank_scripts:{script}", size, world)
        count += 1
    return count


def kill_one(world: World, chance: random.Random) -> str:
    """Kill one of two to four ranks that train and save at a random moment; what the others said."""
    size = chance.choice([2, 3, 4])
    with tempfile.TemporaryDirectory(prefix="ranks-soak-", dir="/var/tmp") as folder:
        ranks = several.Ranks(size, "rank_checks:train_and_save", folder, world)
        victim = chance.randrange(size)
        try:
            end = time.monotonic() + 60
            while not (ranks.folder / "begun").exists() and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1.5))
            ranks.processes[victim].kill()
            ends = ranks.wait(30)
            said = []
            for rank in {*range(size)} - {victim}:
                assert ends[rank][0] == 0, f"rank {rank}: {ends[rank]}"
                code, text = pickle.loads((ranks.folder / f"{rank}.result").read_bytes())
                assert code in NAMED, text
                said.append(f"{rank}: {text[:120]}")
        finally:
            ranks.end()
        whole = [path for path in Path(folder).iterdir() if not path.name.startswith(".")]
        for path in whole:
            model, opt = offloaded(world)
            loaded = funicular.load(path, model, opt)
            assert loaded.step == json.loads((path / "funicular.json").read_text())["training"]["step"]
            funicular.unwrap(model)
        return f"rank {victim} of {size} killed, {len(whole)} checkpoints; {'; '.join(said)}"


def main() -> None:
    """Run all."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**6)
    print(f"seed {seed}")
    random.seed(seed)
    with tempfile.TemporaryDirectory() as disk:
        worlds = [World("host", (disk,)), World("host", (disk,), optimizer="nvme")]
        for i in range(kills):
            print(i, kill_one(worlds[i % 2], random.Random(seed + i)), flush=True)
        print(f"{sum(matrix(world) for world in worlds)} comparisons")


if __name__ == "__main__":
    main()
