"""Several ranks whose own states move up into free memory of their devices: the same bits, wherever they are and whichever rank looks at them."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_checks import CAPACITY, RISEN, offloaded, train
from load_checks import same
from rank_checks import values

import funicular
import several
from models import CUDA
from twin import World

BF16 = torch.bfloat16


@pytest.fixture(params=["0B", "32MiB"], ids=["one set", "two sets"])
def growing_world(host_world: World, request: pytest.FixtureRequest) -> World:
    """Host memory, without second places and with them."""
    return dataclasses.replace(host_world, spare=request.param)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (3, {"dtype": BF16, "clip": 0.05}),
        (2, {"dtype": torch.float16, "clip": 0.05, "accumulate": 2, "steps": 10}),
        (2, {"dtype": BF16, "weather": False, "steps": 9}),
        (3, {"weather": False, "clip": 0.05, "steps": 9, "where": "gpu"}),
        (2, {"dtype": BF16, "where": "gpu"}),
        (2, {"dtype": torch.float16, "clip": 0.05, "where": "gpu", "steps": 10}),
    ],
    ids=str,
)
def test_training(size: int, options: dict[str, Any], growing_world: World):
    several.compare("growth_checks:training", size, growing_world, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("size", "options"), [(2, {}), (3, {"dtype": BF16, "clip": 0.05}), (2, {"dtype": BF16, "where": "gpu"})], ids=str
)
def test_use(size: int, options: dict[str, Any], growing_world: World):
    several.compare("growth_checks:using", size, growing_world, **options)


@pytest.mark.skipif(CUDA, reason="memory of a GPU is not made up")
def test_each_rank_takes_what_it_owns_and_leaves_the_margin(growing_world: World):
    sets = 1 if growing_world.spare == "0B" else 2
    found = several.run(3, "growth_checks:shares", growing_world)
    for taken, states, peak in found:
        assert peak <= CAPACITY
        assert 0.9 * states * sets / 3 < taken < 1.2 * states * sets / 3
    assert sum(taken for taken, *_ in found) >= found[0][1] * sets


def test_a_fixed_budget_stays_fixed(host_world: World):
    assert several.run(2, "growth_checks:fixed", host_world) == [[0], [0]]


def test_one_rank_saves_and_others_resume(growing_world: World, tmp_path: Path):
    """A save by rank 0 alone has the states of all as they are; ranks of other numbers, whose own states are up, load them."""
    folder = tmp_path / "saved"
    went_on = several.run(2, "growth_checks:saved_by_one", str(folder), growing_world)
    model, opt = offloaded(growing_world)
    train(model, opt, range(RISEN))
    saved, its = offloaded(growing_world)
    funicular.load(folder, saved, its)
    before = values(saved, its)
    assert same(before, values(model, opt))
    train(saved, its, range(RISEN, RISEN + 2))
    assert all(same(found, values(saved, its)) for found in went_on)
    for size in (2, 3):
        for loaded, trained in several.run(size, "growth_checks:resumed", str(folder), growing_world):
            assert same(loaded, before)
            # The mean of three ranks, of which one has no batch, is rounded otherwise.
            assert size == 3 or same(trained, values(saved, its))


@pytest.mark.parametrize("way", ["leaving", "closing"])
def test_the_end_leaves_states_at_home(way: str, growing_world: World):
    found = several.run(2, f"growth_checks:{way}", growing_world)
    model, opt = offloaded(growing_world)
    train(model, opt, range(RISEN))
    assert all(same(one, values(model, opt)) for one in found if one)


def test_an_owner_that_is_killed(growing_world: World):
    """Its states are gone: who reads them is told, and does not wait."""
    ranks = several.Ranks(3, "growth_checks:owner_killed", growing_world, 1)
    try:
        ends = ranks.wait()
        assert ends[1][0] == -9
        for rank in (0, 2):
            assert ends[rank][0] == 0, ends[rank][1]
            code, text = pickle.loads((ranks.folder / f"{rank}.result").read_bytes())
            assert code == "FN-E701", text
            assert "rank 1" in text
    finally:
        ranks.end()
