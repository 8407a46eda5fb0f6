"""A rank whose program catches an exception, on which the other ranks wait: they are told at once, and not when it calls something again."""

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
