"""The fewest cases of a product of parameters in which every value occurs, or every pair of values.

A test that asks one question for many placements, types and ways has a product of them as its cases, and most of these say again what
others said. ``@pytest.mark.covering(2)`` leaves so many that any two values of different parameters meet in one;
``@pytest.mark.covering(1)`` leaves each value in one case at least, and ``times=2`` in two. ``--full`` keeps the whole product.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest

#: parameters by name, and a number for each one's value
_Values = tuple[tuple[str, int], ...]


def chosen(cases: list[dict[str, int]], strength: int, times: int = 1) -> list[int]:
    """Which cases stay, in order: those with the most sets of ``strength`` values that were not met ``times`` times yet."""
    strength = min(strength, len(cases[0]))
    sets = [list(itertools.combinations(sorted(case.items()), strength)) for case in cases]
    missing = Counter({values: min(times, n) for values, n in Counter(itertools.chain(*sets)).items()})
    left, kept = list(range(len(cases))), []
    while left and missing.total():
        # Of several that bring as much, the one whose values were met least: so all of them are met about equally often. With pairs that
        # is so anyway, and the first one leads to fewer cases.
        met = Counter(itertools.chain(*(cases[i].items() for i in kept))) if strength == 1 else Counter()
        best = max(left, key=lambda i: (_gain(sets[i], missing), -sum(met[value] for value in cases[i].items())))
        left.remove(best)
        kept.append(best)
        missing.subtract({values: 1 for values in sets[best] if missing[values] > 0})
    return sorted(kept)


def _gain(sets: Iterable[_Values], missing: Counter[_Values]) -> int:
    return sum(missing[values] > 0 for values in sets)


def thin(items: list[pytest.Item]) -> list[pytest.Item]:
    """The cases that may be left out of the tests with the mark ``covering``."""
    products: dict[tuple[object, str], list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("covering") and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            products.setdefault((item.parent, item.originalname), []).append(item)
    left_out: list[pytest.Item] = []
    for cases in products.values():
        mark = cases[0].get_closest_marker("covering")
        assert mark is not None
        # All cases of a test share the objects that are its values.
        values = [{name: id(value) for name, value in case.callspec.params.items()} for case in cases]
        kept = chosen(values, *mark.args, **mark.kwargs)
        left_out += [case for i, case in enumerate(cases) if i not in kept]
    return left_out
