"""The examples with trainers, and the one with an indexed corpus: each is run at toy size, ended, and gone on with."""

from __future__ import annotations

import re
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_documents import TOY

import funicular

transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[3] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def toy(tmp_path: Path, disk: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {**TOY, "FUNICULAR_NVME__PATHS": disk}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


SMALL = ("--hidden", 64, "--layers", 3, "--heads", 4, "--length", 32, "--rows", 2, "--passes", 2, "--save-every", 2)


def test_hf_finetune(toy: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    first = run(monkeypatch, "hf_finetune.py", *SMALL, "--steps", 4)["trainer"]
    assert first.state.global_step == 4
    assert next(first.model.parameters()).dtype == torch.bfloat16
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(toy / "runs" / "model", torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b.detach().cpu()) for a, b in zip(again.parameters(), first.model.parameters()))
    funicular.unwrap(first.model)
    second = run(monkeypatch, "hf_finetune.py", *SMALL, "--steps", 6, "--resume")["trainer"]
    assert funicular.stats(second.model).steps == 2
    funicular.unwrap(second.model)


def test_sft_lora(toy: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trl", reason="make test-integrations has it")
    pytest.importorskip("peft")
    trainer = run(monkeypatch, "sft_lora.py", "--hidden", 64, "--layers", 3, "--steps", 2)["trainer"]
    assert (toy / "adapters" / "adapter_model.safetensors").exists()
    assert not (toy / "adapters" / "model.safetensors").exists()
    funicular.unwrap(trainer.model)


def test_lightning_pretrain(toy: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lightning", reason="make test-integrations has it")
    small = ("--width", 64, "--layers", 3, "--length", 32, "--rows", 2, "--save-every", 2)
    trainer = run(monkeypatch, "lightning_pretrain.py", *small, "--steps", 4)["trainer"]
    assert trainer.global_step == 4
    funicular.unwrap(trainer.lightning_module)
    saved = toy / "pretraining" / "step=2.ckpt"
    trainer = run(monkeypatch, "lightning_pretrain.py", *small, "--steps", 4, "--resume", saved)["trainer"]
    assert funicular.stats(trainer.lightning_module).steps == 2
    funicular.unwrap(trainer.lightning_module)


SHAPES = (
    "--hidden",
    32,
    "--inner",
    64,
    "--heads",
    4,
    "--layers",
    2,
    "--rows",
    2,
    "--lengths",
    12,
    6,
    "--warmup",
    2,
    "--save-every",
    2,
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pretrain_indexed(dtype: str, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Its own small corpus; ended after two steps and started again, it prints what a run without an end prints."""

    def lines(*options: object) -> list[str]:
        capsys.readouterr()
        model = run(monkeypatch, "pretrain_indexed.py", *SHAPES, "--vocab", 300, "--dtype", dtype, *options)["model"]
        funicular.unwrap(model)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]

    # The first of a process adds up in another order than those that follow, in plain PyTorch too.
    lines("--steps", 1, "--out", "warm")
    whole = lines("--steps", 4, "--out", "whole")
    assert len(whole) == 4
    rates = [float(re.search(r"rate (\S+)", line)[1]) for line in whole]
    assert rates == [7.5e-5, 1e-4, 5e-5, 0.0]
    assert (toy / "whole" / "corpus.idx").exists()
    shorter = lines("--steps", 4, "--out", "parts", "--save-every", 2)
    assert shorter == whole
    for name in ("step-4",):
        (toy / "parts" / name).rename(toy / f"{dtype}-later")
    assert lines("--steps", 4, "--out", "parts") == whole[2:]


def test_an_existing_corpus(toy: Path, monkeypatch: pytest.MonkeyPatch):
    """As Megatron writes it: header, sizes, places in bytes, documents; of two-byte and four-byte tokens."""
    module = runpy.run_path(str(EXAMPLES / "pretrain_indexed.py"))
    rows = [np.arange(5), np.arange(10, 27), np.arange(30, 33)]
    for code, kind in ((4, np.int32), (8, np.uint16)):
        flat = np.concatenate(rows).astype(kind)
        flat.tofile("c.bin")
        sizes = np.array([len(row) for row in rows], np.int32)
        places = np.array([0, 5, 22], np.int64) * flat.itemsize
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
        Path("c.idx").write_bytes(head + sizes.tobytes() + places.tobytes() + np.arange(4, dtype=np.int64).tobytes())
        corpus = module["Indexed"](Path("c"))
        assert corpus.sizes.tolist() == [5, 17, 3]
        found = {tuple(corpus.row(number, 3).tolist()) for number in range(64)}
        assert found == {(0, 1, 2), (10, 11, 12), (30, 31, 32)}
    Path("c.idx").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="no index"):
        module["Indexed"](Path("c"))
