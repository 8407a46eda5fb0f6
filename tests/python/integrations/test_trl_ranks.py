"""TRL's trainers on several ranks, with adapters of PEFT and without: the bits of one process that runs each rank's batches in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import several
from children import FOLDERS
from conftest import CUDA
from twin import World

pytest.importorskip("trl", reason="make test-integrations has it")
pytest.importorskip("peft")

import trl_runs

from trainer_ranks import SIZE, check

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(CUDA, reason="their random numbers are those of processors"),
]
READY = f"import sys; sys.path[:0] = {FOLDERS!r}; import torch, torch._dynamo, trl_runs; torch.set_num_threads(1)"


def started(kind: str, policy: Any, adapters: bool, folder: Path, **more: Any) -> several.Ranks:
    """Train on ranks."""
    # On a disk: through files beside the data rank 0 hands the others the answers of DPO's reference.
    trl_runs.datasets.Dataset.from_dict(trl_runs.KINDS[kind][2]).save_to_disk(folder / "data")
    arguments = [kind, str(folder / "ranks"), policy, adapters, str(folder / "data"), more]
    return several.Ranks(SIZE, "trl_runs:train", *arguments, ready=READY)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_in_turn(kind: str, adapters: bool, host_world: World, tmp_path: Path):
    ranks = started(kind, host_world.policy(trl_runs.build(kind.lower())), adapters, tmp_path)
    try:
        plain = trl_runs.reference(kind, tmp_path / "plain", adapters)
        found = ranks.results()
    finally:
        ranks.end()
    assert all((said["frozen"] > 0) == adapters for said in found)
    check(plain, found)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_grpo(adapters: bool, host_world: World, tmp_path: Path):
    """Completions are generated on all ranks, and judged together: the bits of the plain trainer with DistributedDataParallel."""
    found = []
    for name, policy in (("plain", None), ("paged", host_world.policy(trl_runs.build()))):
        (tmp_path / name).mkdir()
        ranks = started("GRPO", policy, adapters, tmp_path / name, gradient_accumulation_steps=1)
        found.append(ranks.results())
    for plain, paged in zip(*found, strict=True):
        assert torch.equal(plain["losses"], paged["losses"])
        assert plain["said"] == paged["said"]
        assert all(torch.equal(plain["weights"][name], paged["weights"][name]) for name in plain["weights"])
        assert paged["size"] == SIZE
    assert not torch.equal(found[1][0]["losses"], found[1][1]["losses"])
