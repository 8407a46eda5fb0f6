"""PEFT's adapters over an offloaded model: made before `offload`, and after it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
from twin import Run, World, compare

peft = pytest.importorskip("peft", reason="make test-integrations has it")
pytest.importorskip("transformers")

import peft_scripts
from peft_scripts import lora

import several
from conftest import CUDA
from trainer_runs import VOCAB, llama

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(**more: Any) -> Any:
    return peft_scripts.adapted(attention_dropout=0.1, **more)


def loss(run: Run, model: Any = None) -> torch.Tensor:
    tokens = 2 + run.tokens(2, 9, below=VOCAB - 2)
    return (run.model if model is None else model)(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(run: Run, steps: int = 3) -> None:
    run.model.train()
    run.opt = run.adamw([p for p in run.model.parameters() if p.requires_grad])
    for _ in range(steps):
        run.step(loss(run))


@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
def test_made_before(more: dict[str, Any], two_worlds: World):
    compare(two_worlds, lambda: adapted(**more), train)


def test_a_frozen_base_costs_its_own_bytes(host_world: World):
    """Two bytes a parameter in bf16, and no gradients and states."""
    model = adapted().to(torch.bfloat16)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    funicular.offload(model, host_world.policy(model))
    used = funicular.stats(model).budgets["host"].used
    rounded = 4 * len(list(model.model.model.layers)) * host_world.granularity
    assert used < 1.5 * frozen + 40 * trained + (1 << 20) + rounded


def test_made_after(two_worlds: World, caplog: Any):
    """Right, and told of: the base was planned as trained."""

    def script(run: Run) -> None:
        run.model = run.wrap(llama())
        torch.manual_seed(2)
        run.model = peft.get_peft_model(run.model, lora())
        train(run)
        run.record_weights()
        run.model = run.model.get_base_model()

    with caplog.at_level(logging.WARNING, "funicular"):
        compare(two_worlds, None, script)
    assert sum("FN-W140" in r.getMessage() for r in caplog.records) == 1


def test_adapters_on_and_off(two_worlds: World):
    def script(run: Run) -> None:
        train(run, 2)
        run.model.eval()
        with run.model.disable_adapter():
            run.record("without", loss(run))
        run.record("with", loss(run))
        run.model.add_adapter("second", lora())
        run.model.set_adapter("second")
        run.record("second", loss(run))
        run.model.set_adapter("default")
        train(run, 1)

    compare(two_worlds, adapted, script)


def test_saved_alone_and_loaded(two_worlds: World, tmp_path: Path):
    def script(run: Run) -> None:
        train(run, 2)
        folder = tmp_path / str(run.offloaded)
        run.model.save_pretrained(folder)
        assert not (folder / "model.safetensors").exists()
        again = peft.PeftModel.from_pretrained(llama(), folder).to(run.device)
        again.eval()
        run.model.eval()
        run.record("here", loss(run))
        run.generator.manual_seed(5)
        run.record("there", loss(run, again))
        run.generator.manual_seed(5)
        run.record("again", loss(run))

    compare(two_worlds, adapted, script)


def test_merged(two_worlds: World):
    """In place, and as a model of its own."""

    def script(run: Run) -> None:
        train(run, 2)
        run.model.eval()
        run.model.merge_adapter()
        run.record("merged", loss(run))
        run.model.unmerge_adapter()
        run.record("unmerged", loss(run))
        alone = copy.deepcopy(run.model).merge_and_unload()
        run.record("alone", loss(run, alone))
        train(run, 1)

    compare(two_worlds, adapted, script)


def test_merged_and_unloaded(two_worlds: World):
    """Of the offloaded model itself: its weights stay where they are, with the adapters' in them."""

    def script(run: Run) -> None:
        train(run, 2)
        model = run.model.merge_and_unload()
        model.eval()
        run.record("merged", loss(run, model))
        for name, p in model.named_parameters():
            run.record(name, p)

    compare(two_worlds, adapted, script)


# Several ranks


@pytest.mark.skipif(CUDA, reason="their random numbers are those of processors")
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("wrapped", {}),
        ("wrapped", {"dtype": torch.bfloat16, "use_dora": True}),
        ("wrapped", {"modules_to_save": ["lm_head"]}),
        ("wrapped", {"checkpointed": True}),
        ("switched", {}),
    ],
    ids=["lora", "dora", "head", "checkpoints", "switched"],
)
def test_on_ranks(script: str, options: dict[str, Any], host_world: World):
    several.compare(f"peft_scripts:{script}", 2, host_world, **options)


@pytest.mark.skipif(CUDA, reason="their random numbers are those of processors")
def test_resumed_on_ranks(host_world: World, tmp_path: Path):
    """Adapters that each rank makes before `offload`: a checkpoint of the whole model has them, and their states."""
    several.compare("peft_scripts:resumed", 2, host_world, folder=str(tmp_path / "saved"))


def test_refused_on_ranks(host_world: World):
    """What would train weights that no rank exchanges, or write to memory that all share: by name, on all."""
    for made_after, merged in several.run(2, "peft_scripts:checked", host_world.policy(llama())):
        assert made_after.startswith(
            "FN-E704 'model.layers.0.self_attn.q_proj.lora_A.default.weight' is trained and came"
        )
        assert merged.startswith("FN-E722")
