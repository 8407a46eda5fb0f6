"""Tiers on NVMe that fail while a checkpoint is saved from them or loaded into them."""

import bisect
import os
import shutil
from pathlib import Path

import pytest
from test_checkpoint import begin
from test_checkpoint_cli import saved
from test_checkpoint_faults import FOREVER

import funicular
from conftest import DEVICE
from twin import World

__all__ = ["saved"]


@pytest.mark.covering(1)
@pytest.mark.parametrize(("fault", "code"), [("flip", "FN-E302"), ("eio", "FN-E301")])
@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_the_tier_cannot_be_read(fault: str, code: str, engine: str, disk: str, io_uring: bool, tmp_path: Path):
    """What a save reads from NVMe is not what was written, or cannot be read: an error by name, and nothing of the save stays."""
    if engine == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    world = World(DEVICE, (disk,), params="nvme", optimizer="nvme", engine=engine)

    def struck(number: int) -> str:
        """Which phase the fault meets that begins at this read."""
        run = begin(world, debug={"faults": f"read:{fault}@{number}x{FOREVER}"})
        try:
            run.train(1, look=False)
        except funicular.Error:
            return "1 training"
        try:
            funicular.save(run.model, run.opt, tmp_path / "c")
        except funicular.StorageError as error:
            assert error.code == code, error
            assert not os.listdir(tmp_path)
            return "2 save"
        assert os.listdir(tmp_path) == ["c"]
        shutil.rmtree(tmp_path / "c")
        return "3 none"

    numbers = range(1, 1 << 11)
    first, end = (bisect.bisect_left(numbers, phase, key=struck) + 1 for phase in ("2 save", "3 none"))
    assert end - first > 2, "no read of a save was struck"
    some = (end - first) // 4  # reads ahead make the ends a little uncertain
    for number in range(first + some, end - some, max(1, some // 2)):
        assert struck(number) == "2 save", number


@pytest.mark.covering(1)
@pytest.mark.parametrize("engine", ["threads", "io_uring"])
def test_the_tier_cannot_be_written(engine: str, saved: Path, disk: str, io_uring: bool):
    """What a load writes to NVMe fails: an error by name, and a model that is half loaded does not run."""
    if engine == "io_uring" and not io_uring:
        pytest.skip("io_uring does not work here")
    world = World(DEVICE, (disk,), params="nvme", optimizer="nvme", engine=engine)

    def struck(number: int) -> str:
        """Which phase the fault meets that begins at this write."""
        try:
            run = begin(world, debug={"faults": f"write:eio@{number}x{FOREVER}"})
        except funicular.Error:
            return "1 offload"
        try:
            funicular.load(saved, run.model, run.opt)
        except funicular.StorageError as error:
            assert error.code == "FN-E301", error
            with pytest.raises(funicular.RuntimeFailure, match="FN-E410"):
                run.train(1)
            return "2 load"
        return "3 none"

    numbers = range(1, 1 << 10)
    first, end = (bisect.bisect_left(numbers, phase, key=struck) + 1 for phase in ("2 load", "3 none"))
    assert end - first > 2, "no write of a load was struck"
    for number in {first, (first + end) // 2, end - 1}:
        assert struck(number) == "2 load", number
