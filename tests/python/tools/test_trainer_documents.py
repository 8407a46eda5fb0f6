"""The pages of docs about trainers: what they show is run as it stands, at toy size."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_documents import TOY, blocks

import funicular
import toy_model
from conftest import CUDA, DEVICE

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

from funicular.integrations.transformers import offloaded
from trainer_runs import Tokens, llama

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.filterwarnings("ignore")


def shown(test: str, page: str) -> list[str]:
    """The blocks of a page that name a test of this file; of a diff, what is new."""
    mark = f"<!-- tested by: tests/python/tools/test_trainer_documents.py::{test} -->"
    found = [block for block in blocks(ROOT / "docs" / page) if block.mark == mark]
    assert found
    return ["\n".join(new(block.text)) if block.language == "diff" else block.text for block in found]


def new(diff: str) -> list[str]:
    return [line[1:] for line in diff.splitlines() if not line.startswith("-")]


def run(text: str, **names: Any) -> dict[str, Any]:
    exec(compile(text, "docs", "exec"), names)
    return names


@pytest.fixture
def toy(tmp_path: Path, disk: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {**TOY, "FUNICULAR_NVME__PATHS": disk}.items():
        monkeypatch.setenv(name, value)
    if not CUDA:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.chdir(tmp_path)
    toy_model.write_model(tmp_path)
    (tmp_path / "policy.toml").write_text("")
    return tmp_path


def test_versions() -> None:
    """The page names those of the two lock files, and these are what `make test-integrations` runs."""
    page = (ROOT / "docs" / "trainers.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+ \| [\d.]+) \|$", page, re.MULTILINE))
    locks = [(ROOT / f"requirements-integrations{which}.lock").read_text() for which in ("-oldest", "")]
    for name, said in rows.items():
        found = [re.search(rf"^{name.lower()}==(\S+)$", lock, re.MULTILINE) for lock in locks]
        assert said == " | ".join(version[1] for version in found if version), name
    assert list(rows) == ["transformers", "accelerate", "TRL", "PEFT", "Lightning"]


def test_trainer(toy: Path) -> None:
    first, mixin = shown("test_trainer", "trainer.md")
    if not CUDA:  # without a GPU the arguments want to hear of it
        first = first.replace("report_to=[]", "report_to=[], use_cpu=True")
    if transformers.__version__.startswith("4."):
        first = first.replace("dtype=", "torch_dtype=")
    names = run(first, data=Tokens())
    assert names["trainer"].model.dtype == torch.bfloat16
    assert sorted(os.listdir("runs")) == ["checkpoint-2", "checkpoint-4"]
    assert Path("out/model.safetensors").exists()
    kind = run(mixin, Trainer=names["Trainer"])["Mine"]
    funicular.unwrap(names["model"])
    mine = kind(names["model"], names["args"], train_dataset=Tokens())
    assert funicular.stats(mine.model).steps == 0
    funicular.unwrap(mine.model)


def test_migration(toy: Path) -> None:
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    (code,) = shown("test_migration", "trainer.md")
    from transformers import TrainingArguments

    model = llama()
    names = run(code, model=model, data=Tokens(), TrainingArguments=TrainingArguments)
    names["trainer"].train()
    assert funicular.stats(model).steps == 2
    funicular.unwrap(model)


def test_accelerate(toy: Path) -> None:
    (code,) = shown("test_accelerate", "accelerate.md")
    model = llama()
    run(code, model=model, torch=torch, loader=torch.utils.data.DataLoader(Tokens(8), batch_size=2))
    assert funicular.stats(model).steps == 2
    assert Path("state/funicular/optimizer.safetensors").exists()
    funicular.unwrap(model)


def test_lightning(toy: Path) -> None:
    pytest.importorskip("lightning", reason="make test-integrations has it")
    (code,) = shown("test_lightning", "lightning.md")
    if not CUDA:
        code = code.replace("devices=1", 'devices=1, accelerator="cpu"')
    names = run(code, build=llama, torch=torch, loader=torch.utils.data.DataLoader(Tokens(8), batch_size=2))
    assert names["trainer"].global_step == 4
    assert Path("last.ckpt/lightning.ckpt").exists()
    funicular.unwrap(names["trainer"].lightning_module)


def test_peft(toy: Path) -> None:
    pytest.importorskip("peft", reason="make test-integrations has it")
    (code,) = shown("test_peft", "peft.md")
    names = run(code, model=llama().to("cuda" if DEVICE == "cuda" else "cpu"))
    assert sum(len(group["params"]) for group in names["opt"].param_groups) == 20
    funicular.unwrap(names["model"])


def test_two_models(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="make test-integrations has it")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "python" / "integrations"))
    import trl_runs

    (code,) = shown("test_two_models", "trainer.md")
    kinds = {"DPOTrainer": trl_runs.trl.DPOTrainer, "offloaded": offloaded, "tokenizer": trl_runs.tokenizer()}
    data = trl_runs.datasets.Dataset.from_dict(trl_runs.PAIRS)
    args = trl_runs.trl.DPOConfig("runs", max_steps=2, max_length=40, report_to=[], use_cpu=not CUDA)
    names = run(
        code, **kinds, model=trl_runs.build(), ref_model=trl_runs.build(), data=data, args=args, funicular=funicular
    )
    names["trainer"].train()
    limits = [funicular.stats(names[name]).budgets["host"].limit for name in ("model", "ref_model")]
    assert funicular.Policy.load("policy.toml").budget.host == "1GiB"
    assert sum(limits) <= 1 << 30
    for name in ("model", "ref_model"):
        funicular.unwrap(names[name])
