"""Checkpoints know nothing of ranks: what several save, any number of them loads."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from load_checks import same, train_and_save
from rank_checks import offloaded_alone, train_alone, values

import funicular
import several
from twin import World


@pytest.fixture(params=["in memory", "on disk"])
def rank_world(request: pytest.FixtureRequest, host_world: World, states_world: World) -> World:
    """States in host memory, and on NVMe."""
    return host_world if request.param == "in memory" else states_world


@pytest.mark.parametrize("wait", [True, False], ids=["waiting", "beside"])
def test_saved_by_two_and_loaded_by_one_two_and_three(wait: bool, rank_world: World, tmp_path: Path):
    folder = str(tmp_path / "saved")
    first, second = several.run(2, "rank_checks:save_and_go_on", folder, rank_world, 2, wait)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model, opt = offloaded_alone(rank_world)
    funicular.load(folder, model, opt)
    saved = values(model, opt)
    assert not same([saved[0]], [first])  # it is the state at the call
    for size in (2, 3) if wait else ():
        for found in several.run(size, "rank_checks:resume", folder, rank_world):
            assert same(found, saved)
    other, its = offloaded_alone(rank_world)
    funicular.load(f"{folder}-alone", other, its)
    assert same(values(other, its), saved)


def test_saved_while_states_are_yet_to_come(rank_world: World, tmp_path: Path):
    """It has the states of its step on all ranks, the last of which may be made after the call."""
    late = (
        "states:delay=20ms"
        if rank_world.optimizer == "host"
        else "rank 1 write:delay=10ms@1x9999,rank 0 read:delay=40ms@1x9999"
    )
    world = dataclasses.replace(rank_world, spare="0MiB")
    several.run(2, "rank_checks:save_each_step", str(tmp_path / "each"), world, True)
    late_world = dataclasses.replace(world, faults=late)
    several.run(2, "rank_checks:save_each_step", str(tmp_path / "beside"), late_world, False)
    files = sorted(path.relative_to(tmp_path / "each") for path in (tmp_path / "each").rglob("*.safetensors"))
    assert len(files) == 2 * 6
    for file in files:
        assert (tmp_path / "each" / file).read_bytes() == (tmp_path / "beside" / file).read_bytes(), file


def test_saved_by_one_and_loaded_by_two(rank_world: World, tmp_path: Path):
    model, opt = offloaded_alone(rank_world)
    train_alone(model, opt)
    funicular.save(model, opt, tmp_path / "saved")
    for found in several.run(2, "rank_checks:resume", str(tmp_path / "saved"), rank_world):
        assert same(found, values(model, opt))


def test_from_the_meta_device(rank_world: World, tmp_path: Path):
    model, _ = offloaded_alone(rank_world)
    funicular.save(model, None, tmp_path / "saved")
    first, second = several.run(2, "rank_checks:on_meta", str(tmp_path / "saved"), rank_world)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (ordinary,) = {several.run(2, "rank_checks:after_one_step", rank_world)[0][0].sum().item()}
    assert first[0].sum().item() == ordinary


def test_unwrapped(rank_world: World):
    first, second = several.run(2, "rank_checks:unwrapped", rank_world)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_byte_is_read_by_one_rank_and_damage_is_told_on_all(rank_world: World, tmp_path: Path):
    saved, damaged = tmp_path / "saved", tmp_path / "damaged"
    expected = train_and_save(saved, rank_world)
    shutil.copytree(saved, damaged)
    for path in damaged.glob("*.safetensors"):
        # The last tensor of each file, which not all ranks read.
        with path.open("r+b") as file:
            file.seek(-4, 2)
            file.write(b"bad!")
    everyone = several.run(3, "load_checks:loads", str(saved), str(damaged), rank_world)
    for way in ("meta", "with states"):
        parts = [part for found in everyone for part in found[f"read, {way}"]]
        assert len(parts) == len(set(parts)), f"{way}: read twice"
        assert all(found[f"read, {way}"] for found in everyone), f"{way}: read by some alone"
    for rank, found in enumerate(everyone):
        assert same([found["meta"]], expected[:1])
        assert same(found["with states"], expected)
        assert same(found["new"], expected)
        for name in ("damaged, meta", "damaged, with states", "damaged, new"):
            assert found[name].startswith("FN-E406"), f"rank {rank}, {name}: {found[name]}"
        assert found["unchanged"]
        assert found["step"] == "nothing"
        assert found["refused"].startswith("FN-E410"), f"rank {rank}: {found['refused']}"
