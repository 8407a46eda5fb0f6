"""Several ranks whose updates begin before the step: the same bits, whatever happens in between, and used where nothing happens."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import several
from twin import Mismatch, World

BF16 = torch.bfloat16


@pytest.fixture(params=["in memory", "on disk"])
def spare_world(request: pytest.FixtureRequest, host_world: World, states_world: World) -> World:
    """States in host memory, and on NVMe, with second places for all units."""
    return dataclasses.replace(host_world if request.param == "in memory" else states_world, spare="32MiB")


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"steps": 4}),
        (3, {"steps": 4, "dtype": BF16, "clip": 0.05, "accumulate": 2}),
        (2, {"steps": 4, "dtype": torch.float16, "clip": 1e9, "look": False}),
        (3, {"steps": 4, "to_none": False, "accumulate": 2, "dtype": BF16, "broken": "exchange_early"}),
        (2, {"steps": 3, "model": "decoder", "tie": True, "ckpt": "reentrant", "broken": "exchange_early"}),
        (2, {"steps": 3, "rows": 1, "accumulate": 2, "dtype": BF16, "clip": 0.05}),
    ],
    ids=str,
)
def test_training(size: int, options: dict[str, Any], spare_world: World):
    several.compare("rank_scripts:train", size, spare_world, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "script",
    [
        "skipping",
        "two_optimizers",
        "looking",
        "cleared",
        "between",
        "differentiating",
        "rates",
        "states_written",
        "experts",
    ],
)
def test_use(script: str, spare_world: World):
    several.compare(f"rank_scripts:{script}", 3 if script == "experts" else 2, spare_world)


def test_what_was_begun_is_used(spare_world: World):
    """All units of which a rank owns a part, but in the first step, which teaches; what a rank does alone meanwhile changes nothing."""
    found = {}
    for between in ("nothing", "read", "edit", "1e9"):
        for (used, in_vain), begun, owns, weights in several.run(2, "ahead_checks:counted", spare_world, between):
            assert begun == [[False] * len(owns)] + [owns] * 5, between
            assert used >= 5 * any(owns), "hardly anything was begun"
            assert in_vain == 0, between
            found.setdefault("weights", weights)
            assert all(torch.equal(a, b) for a, b in zip(found["weights"], weights, strict=True))


def test_what_is_clipped_is_begun_in_vain(spare_world: World):
    for (used, in_vain), _, owns, _ in several.run(2, "ahead_checks:counted", spare_world, "1e-3"):
        assert used == 0
        assert in_vain > 0 or not any(owns)


def test_nothing_is_begun_without_second_places(host_world: World):
    world = dataclasses.replace(host_world, spare="0B")  # a GPU has them by itself
    for counts, begun, _, _ in several.run(2, "ahead_checks:counted", world, "nothing"):
        assert counts == [0, 0]
        assert not any(map(any, begun))


def test_an_interrupted_step_is_taken_again(spare_world: World):
    (first, weights), (second, others) = several.run(2, "ahead_checks:interrupted", spare_world)
    assert first == ["KeyboardInterrupt"] * 5
    assert second == []
    for *_, plain in several.run(2, "ahead_checks:counted", spare_world, "nothing"):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, weights, others, strict=True))


def test_loaded_while_another_rank_reads(spare_world: World):
    several.run(2, "ahead_checks:loaded_while_another_reads", spare_world)


@pytest.mark.parametrize("kind", ["loaded", "another optimizer", "loaded into another optimizer"])
def test_states_that_are_kept_when_others_take_their_place(kind: str, spare_world: World):
    """They go on showing what they showed, as with one process."""
    for before, after in several.run(2, "ahead_checks:kept_over_new_states", spare_world, kind):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_save_and_a_load(host_world: World, spare_world: World, tmp_path: Path):
    """They see what they see where nothing is made ahead."""
    plain = several.run(2, "ahead_checks:saved_and_loaded", str(tmp_path / "plain"), host_world)
    for rank in several.run(2, "ahead_checks:saved_and_loaded", str(tmp_path / "ahead"), spare_world):
        for a, b in zip(plain[0], rank, strict=True):
            assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True))


@pytest.fixture(params=["32MiB", "0B"], ids=["beside", "in_place"])
def trailing_world(host_world: World, request: pytest.FixtureRequest) -> World:
    """Host memory, where weights are made first and states follow late, in the other place or in theirs."""
    return dataclasses.replace(host_world, spare=request.param, faults="states:delay=3ms")


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"steps": 4, "clip": 0.05}),
        (3, {"steps": 4, "dtype": BF16, "clip": 0.05, "accumulate": 2}),
        (2, {"steps": 3, "dtype": torch.float16, "clip": 0.05, "rows": 1, "accumulate": 2}),
    ],
    ids=str,
)
def test_weights_first(size: int, options: dict[str, Any], trailing_world: World):
    several.compare("rank_scripts:train", size, trailing_world, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize("script", ["two_optimizers", "looking", "rates", "states_written", "experts"])
def test_use_of_weights_first(script: str, trailing_world: World):
    several.compare(f"rank_scripts:{script}", 2, trailing_world)


def test_weights_come_first(trailing_world: World):
    """On all ranks, in each step whose gradients are clipped; without other places in all."""
    for clip, every in (("1e-3", True), ("nothing", trailing_world.spare == "0B")):
        for ahead in several.run(2, "ahead_checks:first", trailing_world, clip):
            assert ahead.weights_first >= (5 if every else 1)
            assert every == (ahead.used == 0)


def test_a_save_and_a_load_amid_it(host_world: World, trailing_world: World, tmp_path: Path):
    plain = several.run(2, "ahead_checks:saved_and_loaded", str(tmp_path / "plain"), host_world)
    for rank in several.run(2, "ahead_checks:saved_and_loaded", str(tmp_path / "later"), trailing_world):
        for a, b in zip(plain[0], rank, strict=True):
            assert all(torch.equal(c, d) for c, d in zip(a, b, strict=True))


def test_can_fail(spare_world: World):
    """What was begun from gradients that are cleared since shows."""
    with pytest.raises(Mismatch):
        several.compare("rank_scripts:cleared", 2, spare_world, broken="keep_what_was_begun")
