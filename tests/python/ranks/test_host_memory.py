"""What several ranks take of the host's memory at the start: beside the region that they share each takes as much for any model."""

from pathlib import Path

import pytest
from memory_checks import HBM, HOST, tall

import cgroups
import facts
import funicular
import several
from models import CUDA

SMALL, LARGE = 3, 10
#: bytes by which the two models differ
MORE = (LARGE - SMALL) * (8 << 20)
#: bytes of a rank beside the plan: gradients of five blocks that wait for other ranks, of the one that computes, and of two on their way; and code
#: and connections that are used for the first time
BESIDE = 8 * (8 << 20) + (48 << 20)


@pytest.mark.skipif(CUDA, reason="the host device's frames are measured, and CUDA takes host memory of its own")
def test_a_model_on_meta_is_in_host_memory_once(tmp_path: Path):
    taken = {}
    for depth in (SMALL, LARGE):
        saved = str(tmp_path / f"saved-{depth}")
        funicular.save(tall(depth), None, saved)
        taken[depth] = several.run(2, "memory_checks:taken_at_the_start", depth, saved)
    for small, large in zip(taken[SMALL], taken[LARGE], strict=True):
        assert large - small < MORE / 5
    # The measure shows a copy on each rank.
    for copied, large in zip(several.run(2, "memory_checks:taken_at_the_start", LARGE, ""), taken[LARGE], strict=True):
        assert copied > large
        assert copied > LARGE * (8 << 20)


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="CUDA's own memory on the host is not in the plan")
@pytest.mark.parametrize("percent", [3, -60])
def test_four_ranks_in_a_cgroup(percent: int, disk: str):
    """At the start, in training and in a save: 3 % more than the plan of one process, with the compute tier and the gradients on their way of each.

    With 60 % less the system ends them, so that the limit is one.
    """
    depth, saved, following = 16, f"{disk}/saved", f"{disk}/next"
    funicular.save(tall(depth), None, saved)
    with cgroups.limited(int(HOST * (1 + percent / 100)) + 4 * (HBM + BESIDE)) as group:
        ranks = several.Ranks(
            4,
            "memory_checks:trained_and_saved",
            str(group),
            percent > 0,
            depth,
            saved,
            following,
            broken="exchange_early+little_memory",
        )
        try:
            ends = ranks.wait()
        finally:
            ranks.end()
        facts.eventually(lambda: not (group / "cgroup.procs").read_text())
    if percent > 0:
        assert [status for status, _ in ends] == [0] * 4, ends
        assert Path(following).exists()
    else:
        assert -9 in [status for status, _ in ends], ends
