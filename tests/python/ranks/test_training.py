"""Several ranks train a model to the bits of one process that runs each rank's batch in turn."""

from typing import Any

import pytest
import torch

import several
from twin import Mismatch, World

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"whole_end": True}),
        (3, {}),
        (2, {"dtype": BF16, "accumulate": 4}),
        (3, {"dtype": BF16, "clip": 0.05, "accumulate": 2}),
        (4, {"dtype": torch.float16}),
        (2, {"clip": 1e9}),
        (2, {"clip": 0.05, "look": False, "steps": 3}),
        (2, {"to_none": False, "accumulate": 2, "dtype": BF16}),
        (3, {"model": "decoder", "tie": True, "dtype": BF16}),
        (2, {"model": "decoder", "matmul": True, "ckpt": "reentrant", "accumulate": 2}),
        (2, {"model": "decoder", "tie": True, "ckpt": "saved_tensors", "clip": 0.05}),
    ],
    ids=str,
)
def test_training(size: int, options: dict[str, Any], host_world: World):
    several.compare("rank_scripts:train", size, host_world, **options)


@pytest.mark.parametrize(
    "options", [{"clip": 0.05, "accumulate": 2}, {"model": "decoder", "ckpt": "reentrant", "tie": True}], ids=str
)
def test_units_exchanged_within_the_backward(options: dict[str, Any], host_world: World):
    several.compare("rank_scripts:train", 2, host_world, broken="exchange_early", steps=3, **options)


@pytest.mark.parametrize(
    "options", [{"clip": 0.05, "accumulate": 2}, {"model": "decoder", "ckpt": "saved_tensors", "dtype": BF16}], ids=str
)
def test_units_exchanged_within_the_first_backward(options: dict[str, Any], host_world: World):
    """Where memory is short."""
    several.compare("rank_scripts:train", 2, host_world, broken="exchange_early+little_memory", **options)


@pytest.mark.parametrize(
    ("size", "script", "options"),
    [
        (2, "train", {"clip": 0.05, "accumulate": 2}),
        (3, "train", {"clip": 0.05, "dtype": BF16, "model": "decoder", "tie": True}),
        (3, "experts", {"clip": 0.05, "to_none": False}),
        (2, "looking", {}),
    ],
    ids=str,
)
def test_norms_of_means_that_are_exchanged(size: int, script: str, options: dict[str, Any], host_world: World):
    """As GPUs do, which take norms in memory of their own."""
    several.compare(f"rank_scripts:{script}", size, host_world, broken="exchange_norms", **options)


def test_gradients_that_land_late(host_world: World):
    """A step does not wait for the parts of other ranks; a rank that looks at gradients does."""
    several.compare("rank_scripts:train", 2, host_world, broken="land_late", clip=0.05, steps=2)
    with pytest.raises(Mismatch, match=r"grad|norm"):
        several.compare("rank_scripts:train", 2, host_world, broken="land_late+look_early", steps=2)


def test_norms_can_fail(host_world: World):
    with pytest.raises(Mismatch, match="norm"):
        several.compare("rank_scripts:train", 2, host_world, broken="exchange_norms+halve_norms", clip=0.05)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"rows": 1, "accumulate": 2, "dtype": BF16, "clip": 0.05}),
        (2, {"rows": 2, "tier": "host", "model": "decoder", "tie": True, "broken": "exchange_early"}),
    ],
    ids=str,
)
def test_micro_batches(size: int, options: dict[str, Any], host_world: World):
    """Slices are summed within the rank, and exchanged once; ranks have different numbers of slices."""
    several.compare("rank_scripts:train", size, host_world, **options)


@pytest.mark.parametrize("to_none", [True, False])
def test_parameters_without_gradients(to_none: bool, host_world: World):
    """On some ranks, on all, in some steps."""
    several.compare("rank_scripts:experts", 3, host_world, to_none=to_none, clip=0.0 if to_none else 0.05)


@pytest.mark.parametrize("script", ["skipping", "two_optimizers", "looking", "cleared", "between", "differentiating"])
def test_use(script: str, host_world: World):
    several.compare(f"rank_scripts:{script}", 2, host_world)


@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        ("swap_ranks", FP32),
        ("drop_a_rank", BF16),
        ("divide_twice", BF16),
        ("round_every_sum", BF16),
        ("forget_what_was_there", BF16),
    ],
)
def test_can_fail(what: str, dtype: torch.dtype, host_world: World):
    """What is broken shows in the first loss after a step, or in gradients."""
    with pytest.raises(Mismatch, match=r"grad|losses"):
        several.compare("rank_scripts:train", 3, host_world, broken=what, dtype=dtype, accumulate=2)
