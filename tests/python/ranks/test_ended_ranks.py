"""A rank that is killed is a named error on the others, soon."""

import dataclasses

import pytest

from several import one_is_killed
from twin import World


@pytest.mark.parametrize(
    ("where", "spare"),
    [
        ("forward", "auto"),
        ("backward", "auto"),
        ("step", "auto"),
        ("after", "auto"),
        ("step", "32MiB"),
        ("after", "32MiB"),
    ],
)
def test_killed(where: str, spare: str, host_world: World):
    """Also where updates of the step have begun."""
    one_is_killed(3, 1, dataclasses.replace(host_world, spare=spare), where)
