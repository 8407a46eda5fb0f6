"""TRL's trainers on several ranks, with adapters of PEFT and without: the bits of one process that runs each rank's batches in turn."""

from __future__ import annotations

import shutil
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
from trainer_runs import equal

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


def test_adapters_of_a_checkpoint(host_world: World, tmp_path: Path):
    """Ranks are told that they cannot resume them. One process resumes them, and ranks begin with a model that has them."""
    policy, out = host_world.policy(trl_runs.build()), tmp_path / "ranks"
    first = started("SFT", policy, True, tmp_path).results()
    arguments = [str(out), policy, str(tmp_path / "data")]
    ranks = several.Ranks(SIZE, "trl_runs:refused_then_begun", *arguments, ready=READY)
    try:
        begun = trl_runs.reference("SFT", tmp_path / "plain", True, begun=out / "checkpoint-3")
        found = ranks.results()
    finally:
        ranks.end()
    assert all(said.startswith(f"FN-E141 {out / 'checkpoint-3'} holds adapters alone") for said, _ in found)
    assert all("PeftModel.from_pretrained" in said for said, _ in found)
    check(begun, [rank for _, rank in found])
    assert not torch.equal(first[0]["losses"], found[0][1]["losses"])
    alone = []
    for name, given in (("alone", policy), ("by itself", None)):
        shutil.copytree(out, tmp_path / name)
        checkpoint = str(tmp_path / name / "checkpoint-3")
        alone.append(
            trl_runs.run("SFT", given, tmp_path / name, True, resume=checkpoint, **trl_runs.of_ranks("SFT", SIZE))
        )
    assert equal(*alone)
    assert alone[0].state.global_step == 6
