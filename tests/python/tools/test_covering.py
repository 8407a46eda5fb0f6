"""The cases that stand for a product: every value, or every pair of values, and each test of a product has some."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from covering import chosen


def product(*sizes: int) -> list[dict[str, int]]:
    names = [f"parameter {i}" for i in range(len(sizes))]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*map(range, sizes))]


@pytest.mark.parametrize("strength", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2, 2), (9, 4, 2), (3, 2, 2, 4), (23, 5), (3,)], ids=str)
def test_nothing_is_missed(sizes: tuple[int, ...], strength: int) -> None:
    cases = product(*sizes)
    kept = [cases[i] for i in chosen(cases, strength)]
    sets = lambda some: {c for case in some for c in itertools.combinations(case.items(), min(strength, len(sizes)))}
    assert kept
    assert sets(kept) == sets(cases)


@pytest.mark.parametrize(
    ("sizes", "strength", "count"),
    [((2, 2, 2), 2, 4), ((9, 4, 2), 2, 36), ((3, 3, 2), 2, 9), ((3, 3, 2), 1, 3), ((23, 5), 1, 23), ((4, 5), 2, 20)],
    ids=str,
)
def test_few_stay(sizes: tuple[int, ...], strength: int, count: int) -> None:
    assert len(chosen(product(*sizes), strength)) == count


def test_several_times_and_evenly() -> None:
    cases = product(23, 5)
    kept = [cases[i] for i in chosen(cases, 1, times=2)]
    first, second = (Counter(case[name] for case in kept) for name in cases[0])
    assert set(first.values()) == {2}
    assert min(second.values()) >= 9
