"""Saves of rank 0 that read while all ranks train on: the state of the call, to the bit."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

import several
from twin import World

#: so slow that the next steps come long before the end of a save
SLOW = "rank 0 write:delay=20ms@1x1000000"
#: how states come to be, and where: the second places that there are room for, and faults
WAYS = {
    "in place": ("0MiB", SLOW),
    "second places": ("32MiB", SLOW),
    "states that follow": ("0MiB", f"{SLOW},states:delay=20ms"),
    "states that follow, second places": ("32MiB", f"{SLOW},states:delay=20ms"),
    "states on disk": ("32MiB", SLOW),
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.covering(1)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3])
def test_it_has_the_state_of_the_call(way: str, size: int, host_world: World, states_world: World, tmp_path: Path):
    """The call returns before a unit was read, and all are at the next step then."""
    world = states_world if way == "states on disk" else host_world
    several.run(size, "save_checks:waited", str(tmp_path / "waited"), world)
    spare, faults = WAYS[way]
    world = dataclasses.replace(world, spare=spare, faults=faults)
    events = several.run(size, "save_checks:beside", str(tmp_path / "beside"), world)
    assert events[0] == ["returned", "read"]
    saved = files(tmp_path / "waited")
    assert saved
    assert files(tmp_path / "beside") == saved
    assert files(tmp_path / "beside-end") == files(tmp_path / "waited-end") != saved


def test_a_rank_that_is_killed_amid_its_save_is_named_by_those_that_wait_for_it(host_world: World, tmp_path: Path):
    ranks = several.Ranks(3, "save_checks:killed", str(tmp_path / "saved"), host_world)
    try:
        ends = ranks.wait()
        assert ends[0][0] == -9
        for rank in (1, 2):
            assert ends[rank][0] == 0, ends[rank][1]
            (said,) = pickle.loads((ranks.folder / f"{rank}.result").read_bytes())
            assert "FN-E701" in said, said
            assert "rank 0" in said, said
    finally:
        ranks.end()
    assert (tmp_path / "saved-before").exists()
    assert not (tmp_path / "saved").exists()


def test_all_go_on_after_a_save_that_was_interrupted(host_world: World, tmp_path: Path):
    first, second = several.run(2, "save_checks:interrupted", str(tmp_path / "saved"), host_world)
    assert (first[0], second[0]) == ("KeyboardInterrupt", "")
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert not (tmp_path / "saved").exists()


def test_a_load_of_all_waits_until_the_save_has_read(host_world: World, tmp_path: Path):
    several.run(2, "save_checks:loads_beside", str(tmp_path / "saved"), host_world)
    first, waited, beside, loaded = (
        files(tmp_path / name) for name in ("saved-first", "saved-waited", "saved", "saved-loaded")
    )
    assert beside == waited != first
    assert loaded == first
