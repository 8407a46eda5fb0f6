"""A rank whose program catches an exception, on which the other ranks wait: they are told at once, and not when it calls something again."""

import pickle

import pytest

import several
from twin import World


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "where", ["hook of a tensor", "hook behind the last gradient", "hook of a module", "gradient taken away"]
)
def test_a_failed_backward_that_is_caught(where: str, size: int, host_world: World):
    found = several.run(size, "failing_checks:caught", host_world, where)
    first, after = found.pop(1)
    assert first.startswith("UsageError FN-E704" if where == "gradient taken away" else "ZeroDivisionError")
    assert after.startswith("FN-E7")
    for (said,) in found:
        assert said.startswith("FN-E701 rank 1 (process ")
        assert ("FN-E704" if where == "gradient taken away" else "FN-E723") in said


def test_the_end_of_python_after_a_lost_rank(host_world: World):
    """It says nothing more: a model that has failed is looked at once again there, when classes cannot be imported."""
    ranks = several.Ranks(2, "failing_checks:outlived", host_world, whole_end=True)
    try:
        ends = ranks.wait()
        assert [status for status, _ in ends] == [0, 0], ends
        assert "FN-E701" in pickle.loads((ranks.folder / "0.result").read_bytes())
        assert "Exception ignored" not in ends[0][1]
    finally:
        ranks.end()
