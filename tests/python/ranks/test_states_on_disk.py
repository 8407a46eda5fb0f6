"""Several ranks whose optimizer states live on NVMe, in files that all of them have open."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_checks import offloaded_alone

import several
from models import CUDA
from twin import World

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"steps": 3}),
        (3, {"dtype": BF16, "clip": 0.05, "accumulate": 2}),
        (2, {"dtype": BF16, "accumulate": 2, "look": False, "steps": 3}),
        (3, {"model": "decoder", "tie": True, "clip": 1e9}),
    ],
    ids=str,
)
def test_training(size: int, options: dict[str, Any], states_world: World):
    several.compare("rank_scripts:train", size, states_world, **options)


def test_pieces_that_are_wider_than_a_part(states_world: World):
    """Then a rank may own nothing of a unit."""
    several.compare("rank_scripts:train", 3, dataclasses.replace(states_world, host=""), steps=3)


@pytest.mark.parametrize("script", ["skipping", "two_optimizers", "looking", "experts"])
def test_use(script: str, states_world: World):
    several.compare(f"rank_scripts:{script}", 2, states_world)


def test_where_host_memory_is_small(states_world: World):
    """States that it does not hold go there by themselves."""
    world = dataclasses.replace(states_world, optimizer="auto", host="3MiB")
    several.compare("rank_scripts:train", 2, world, steps=3)
    found = several.run(2, "disk_checks:placed", world)
    assert found[0] == found[1]
    assert 0 < found[0][0] < found[0][1] + (256 << 10), found


def test_with_io_uring(io_uring: bool, states_world: World):
    if not io_uring:
        pytest.skip("io_uring does not work here")
    several.compare("rank_scripts:train", 2, dataclasses.replace(states_world, engine="io_uring"))


def test_each_rank_reads_and_writes_its_part(states_world: World):
    steps = 3
    found = several.run(3, "disk_checks:traffic", states_world, steps)
    states = found[0]["states"]
    written = [one["written"] for one in found]
    assert sum(written) - steps * states < steps * 64 << 10, (written, states)
    assert sum(written) >= steps * states
    if not CUDA:  # there a unit of this size is one chunk, which one rank owns
        assert max(written) < steps * states
    # What was never written is not read.
    assert sum(one["read"] for one in found) >= (steps - 1) * states


@pytest.mark.parametrize(("where", "victim"), [("backward", 1), ("step", 1), ("after", 1), ("after", 0)])
def test_killed(where: str, victim: int, states_world: World):
    """It is named, and leaves no space taken: its directory is removed by the next run."""
    several.one_is_killed(3, victim, states_world, where)
    (disk,) = map(Path, states_world.paths)
    left = [*disk.iterdir()]
    # Files of data have no names.
    assert [p.name for one in left for p in one.iterdir()] == (["owner"] if victim == 0 else [])
    model, _ = offloaded_alone(states_world)
    assert not any(one.exists() for one in left)
    del model


@pytest.mark.parametrize("fault", ["write:eio@2x99", "read:flip@1x99", "write:enospc@1x99"])
def test_a_disk_that_fails_one_rank(fault: str, states_world: World):
    world = dataclasses.replace(states_world, faults=f"rank 1 {fault}")
    told, own = several.run(2, "disk_checks:trained_until", world, 4)
    assert own[0] == ("FN-E302" if "flip" in fault else "FN-E301"), own
    assert told[0] == "FN-E701", told
    assert "rank 1" in told[1]
    assert own[0] in told[1]


def test_space_is_planned_once(states_world: World):
    """Too little of it is one error on all ranks."""
    first, second = several.run(2, "rank_checks:refused_policy", states_world, {"budget": {"nvme": "64KiB"}})
    assert first[0].startswith("FN-E203")
    assert "FN-E721 rank 0 failed when it made its runtime: FN-E203" in second[0]
