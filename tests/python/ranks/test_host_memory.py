"""What several ranks take of the host's memory at the start: beside the region that they share each takes as much for any model."""

from pathlib import Path

import pytest
from memory_checks import tall

import funicular
import several
from models import CUDA

SMALL, LARGE = 3, 16
#: bytes by which the two models differ
MORE = (LARGE - SMALL) * (8 << 20)


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
