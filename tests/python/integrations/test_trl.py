"""TRL's trainers over an offloaded model, with adapters of PEFT and without: the bits of the plain trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import funicular
from twin import World

trl = pytest.importorskip("trl", reason="make test-integrations has it")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from trl_runs import KINDS, build, run

from funicular.integrations.policies import divided
from trainer_runs import equal

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_like_the_plain_trainer(kind: str, adapters: bool, two_worlds: World, tmp_path: Path):
    if kind == "DPO" and not adapters:
        pytest.skip("test_dpo_against_a_second_model")
    plain = run(kind, None, tmp_path / "plain", adapters)
    paged = run(kind, two_worlds, tmp_path / "paged", adapters)
    assert equal(plain, paged)
    assert isinstance(paged._adamw(), funicular.AdamW)
    if adapters:
        # A frozen base has neither gradients nor states: its own bytes, and those of the adapters, once each.
        size = sum(p.nbytes for p in paged.model.parameters())
        tier = "host" if two_worlds.params == "host" else "nvme"
        assert funicular.stats(paged.model).budgets[tier].used < 4 * size


@pytest.mark.parametrize("second", ["precomputed", "resident", "offloaded"])
def test_dpo_against_a_second_model(second: str, host_world: World, tmp_path: Path):
    """Its answers are computed beforehand; or it stays beside the model; or it is offloaded too, by its part of one policy."""
    found = []
    for name, world in (("plain", None), ("paged", host_world)):
        more: dict[str, Any] = {"precompute_ref_log_probs": second == "precomputed"}
        reference = build()
        if second == "offloaded" and world is not None:
            reference.requires_grad_(False)
            world, its = divided(world.policy(reference, frames=8), build(), reference)
            funicular.offload(reference, its)
        KINDS["DPO"][3].clear()
        KINDS["DPO"][3]["ref_model"] = reference
        try:
            found.append(run("DPO", world, tmp_path / name, False, **more))
        finally:
            KINDS["DPO"][3].clear()
    assert equal(*found)


def test_two_models_share_one_budget(host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The parts add up to the whole, and are held; the same policy for both would be twice of it, and is refused."""
    whole = host_world.policy(build(), frames=8, budget={"host": "6MiB"})
    reference = build().requires_grad_(False)
    mine, its = divided(whole, build(), reference)
    funicular.offload(reference, its)
    monkeypatch.setitem(KINDS["DPO"][3], "ref_model", reference)
    trained = run("DPO", mine, tmp_path, False, precompute_ref_log_probs=False, max_steps=2).model
    both = [funicular.stats(model).budgets for model in (reference, trained)]
    for tier, limit in (("hbm", int(whole["budget"]["hbm"].removesuffix("B"))), ("host", 6 << 20)):
        limits = [found[tier].limit for found in both]
        assert 0.99 * limit < sum(limits) <= limit
        assert all(found[tier].used <= found[tier].limit for found in both)
    assert both[0]["host"].limit < both[1]["host"].limit / 3
    said = "FN-E141 policy= has the budgets with which.*LlamaForCausalLM.*twice.*divided"
    with pytest.raises(funicular.UsageError, match=said):
        run("DPO", its, tmp_path, False, precompute_ref_log_probs=False)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_resumed(adapters: bool, two_worlds: World, tmp_path: Path):
    plain = run("SFT", None, tmp_path / "plain", adapters)
    first = run("SFT", two_worlds, tmp_path / "paged", adapters)
    assert equal(plain, first)
    funicular.unwrap(first.model)
    again = run("SFT", two_worlds, tmp_path / "paged", adapters, resume=str(tmp_path / "paged" / "checkpoint-3"))
    assert equal(plain, again)
    names = {path.name for path in (tmp_path / "paged" / "checkpoint-3").iterdir()}
    # Adapters are saved alone, as PEFT saves them.
    assert ("adapter_model.safetensors" in names) == adapters
    assert ("model.safetensors" in names) != adapters
