"""A rank that is killed is a named error on the others, soon."""

import dataclasses
import pickle

import pytest

from several import Ranks
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
    size, victim = 3, 1
    ranks = Ranks(size, "rank_checks:killed", dataclasses.replace(host_world, spare=spare), where, victim)
    try:
        ends = ranks.wait()  # whoever waits for long is killed, and has no status
        assert ends[victim][0] == -9
        for rank in {*range(size)} - {victim}:
            assert ends[rank][0] == 0, ends[rank][1]
            code, text = pickle.loads((ranks.folder / f"{rank}.result").read_bytes())
            assert code == "FN-E701", text
            assert f"rank {victim}" in text
    finally:
        ranks.end()
