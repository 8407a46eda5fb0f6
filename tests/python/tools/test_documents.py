"""README.md and docs/*.md: every block of code is run by a test, or marked as an illustration; links and figures lead somewhere.

The line before a block says which: ``<!-- illustration -->``, or ``<!-- tested by: tests/FILE::TEST -->``. Blocks that name a test of this
file are run here as they stand, at toy size, in an empty directory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pkgutil
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import funicular
import toy_model
from conftest import CUDA, DEVICE
from models import Stack

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (illustration|tested by: (tests/[\w/]+\.(?:py|rs))::(\w+)) -->")


class Block(NamedTuple):
    """A fenced block: where it begins, its language, what is said before it, its text."""

    page: Path
    line: int
    language: str
    mark: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text().splitlines()
    start = None
    for at, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = at
        else:
            mark = lines[start - 1].strip() if start else ""
            language = lines[start].strip("` ")
            yield Block(page, start + 1, language, mark, "\n".join(lines[start + 1 : at]) + "\n")
            start = None
    assert start is None, f"{page.name}:{start}: the block does not end"


def run_by(test: str, page: str, language: str) -> list[str]:
    """The blocks of a page that name a test of this file."""
    mark = f"<!-- tested by: tests/python/tools/test_documents.py::{test} -->"
    found = [b.text for b in blocks(ROOT / page) if b.mark == mark and b.language == language]
    assert found, f"{page} has no {language} for {test}"
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_an_illustration(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        mark = MARK.fullmatch(block.mark)
        if mark is None:
            wrong.append(f"{where}: the line before says neither 'illustration' nor 'tested by: tests/FILE::TEST'")
        elif mark[2] is not None:
            file = ROOT / mark[2]
            define = rf"^\s*(def|fn) {mark[3]}\("
            if not file.exists() or not re.search(define, file.read_text(), re.MULTILINE):
                wrong.append(f"{where}: there is no {mark[2]}::{mark[3]}")
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as hosts of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(f"{page.name}: {target}")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_reading_order() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_measured_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    """Each row of the table names a machine, and its seconds and ratio stand in docs/benchmarks.md too."""
    section = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (?!system|-)(.*) \|$", section, re.MULTILINE)
    assert 2 < len(rows) <= 6
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    for row in rows:
        system, machine, seconds, ratio = row.split(" | ")
        assert machine in ("one H100", "one H200"), system
        assert re.search(rf"\b{re.escape(seconds)} s\b", measured), (
            f"{system}: {seconds} s is not in docs/benchmarks.md"
        )
        assert re.search(rf"\b{re.escape(ratio)}\b", measured), f"{system}: {ratio} is not in docs/benchmarks.md"


def test_sets_of_the_guard_are_those_that_the_recipe_names() -> None:
    recipe = (ROOT / "CONTRIBUTING.md").read_text().partition("### A function of torch")[2].partition("\n### ")[0]
    sets = (ROOT / "python" / "funicular" / "guard" / "torch_functions.py").read_text()
    named = re.findall(r"^\| `([A-Z_]+)` \|", recipe, re.MULTILINE)
    assert len(named) > 3
    assert [name for name in named if not re.search(rf"^{name}\b.* = ", sets, re.MULTILINE)] == []


# What is run


TOY = {
    "FUNICULAR_DEVICE": DEVICE,
    "FUNICULAR_BUDGET__HBM": "64MiB" if CUDA else "4MiB",
    "FUNICULAR_BUDGET__HOST": "1GiB",
}


@pytest.fixture
def toy(tmp_path: Path, disk: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with a toy model as `Qwen2.5-7B`, to work in; policies are given its budgets and its disk."""
    for name, value in {**TOY, "FUNICULAR_NVME__PATHS": disk}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    toy_model.write_model(tmp_path)
    return tmp_path


def test_readme(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (policy,) = run_by("test_readme", "README.md", "toml")
    (code,) = run_by("test_readme", "README.md", "python")
    (toy / "policy.toml").write_text(policy)
    place: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), place)
    model = place["model"]
    assert isinstance(model, torch.nn.Module)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "1 steps" in capsys.readouterr().out
    assert (toy / "runs" / "step-1" / "model.safetensors").exists()
    funicular.unwrap(model)


def test_quickstart(toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys) -> None:
    """Trained, ended, resumed from its checkpoint: every weight and state is that of a run without interruption."""
    (policy,) = run_by("test_quickstart", "docs/quickstart.md", "toml")
    (script,) = run_by("test_quickstart", "docs/quickstart.md", "python")
    example = (ROOT / "examples" / "policies" / "quickstart.toml").read_text()
    assert example.partition("\n\n")[2] == policy
    (toy / "policy.toml").write_text(policy.replace("every = 10", "every = 2"))
    (toy / "finetune.py").write_text(script)
    (toy / "text.txt").write_text(toy_model.TEXT)
    caplog.set_level(logging.INFO, logger="funicular")

    def losses(steps: int, runs: str) -> list[str]:
        sizes = [*toy_model.SIZES, "--steps", str(steps), "--runs", runs]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *sizes])
        capsys.readouterr()
        model = runpy.run_path("finetune.py", run_name="__main__")["model"]
        funicular.unwrap(model)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]

    whole = losses(4, "whole")
    assert losses(2, "parts") == whole[:2]
    assert losses(4, "parts") == whole[2:]
    assert sorted(os.listdir("parts")) == ["step-2", "step-4"]
    for name in "model.safetensors", "optimizer.safetensors":
        assert (toy / "parts" / "step-4" / name).read_bytes() == (toy / "whole" / "step-4" / name).read_bytes(), name
    assert "FN-I307 step 2" in caplog.text


def test_policies(tmp_path: Path) -> None:
    """Each example is a policy by itself."""
    found = [
        block.text
        for page in PAGES
        for block in blocks(page)
        if block.language == "toml" and "::test_policies " in block.mark
    ]
    assert len(found) >= 2
    for text in found:
        (tmp_path / "policy.toml").write_text(text)
        assert funicular.Policy.from_file(tmp_path / "policy.toml").activations.micro_batch != "off"


def test_migrated_loop(toy: Path) -> None:
    (code,) = run_by("test_migrated_loop", "docs/migration.md", "python")
    (toy / "policy.toml").write_text("")
    model, device = Stack().to(DEVICE if CUDA else "cpu"), "cuda" if CUDA else "cpu"
    before = [p.detach().clone() for p in model.parameters()]
    batches = [torch.randn(2, before[0].shape[1]) for _ in range(2)]
    exec(
        compile(code, "migration.md", "exec"),
        {"funicular": funicular, "torch": torch, "model": model, "device": device, "batches": batches},
    )
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (toy / "checkpoint" / "funicular.json").exists()
    funicular.unwrap(model)


def test_policy_in_python() -> None:
    (code,) = run_by("test_policy_in_python", "docs/policy.md", "python")
    place: dict[str, object] = {}
    exec(compile(code, "policy.md", "exec"), place)
    assert place["smaller"].budget.hbm == "12GiB"


def test_two_models(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has its part; nothing is said of budgets that are counted twice."""
    (code,) = run_by("test_two_models", "docs/policy.md", "python")
    (toy / "policy.toml").write_text("")
    models = {"model": Stack(), "teacher": Stack()}
    with caplog.at_level(logging.WARNING, "funicular"):
        exec(compile(code, "policy.md", "exec"), {"funicular": funicular, **models})
    assert "FN-W212" not in caplog.text
    limits = [funicular.stats(model).budgets["host"].limit or 0 for model in models.values()]
    assert limits[0] > limits[1]
    assert 0.99 * 2**30 < sum(limits) <= 2**30
    for model in models.values():
        funicular.unwrap(model)


def test_checkpoints(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved, weights = run_by("test_checkpoints", "docs/checkpoints.md", "python")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("Qwen2.5-7B")
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(opt)
    model(input_ids=torch.arange(8)[None]).logits.mean().backward()
    opt.step()
    schedule.step()
    exec(
        compile(saved, "checkpoints.md", "exec"),
        {"funicular": funicular, "model": model, "opt": opt, "schedule": schedule},
    )
    assert sorted(os.listdir("runs")) == ["step-1000", "step-1100"]
    place = {
        "torch": torch, "funicular": funicular, "policy": None, "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "config": transformers.AutoConfig.from_pretrained("Qwen2.5-7B"),
    }  # fmt: skip
    exec(compile(weights.replace("/models/that-one", "Qwen2.5-7B"), "checkpoints.md", "exec"), place)
    fresh = transformers.AutoModelForCausalLM.from_pretrained("Qwen2.5-7B")
    assert torch.equal(place["model"].lm_head.weight.detach().cpu(), fresh.lm_head.weight)
    funicular.unwrap(place["model"])
    (commands,) = run_by("test_checkpoints", "docs/checkpoints.md", "console")
    for line in commands.splitlines():
        words = line.partition("#")[0].split()
        assert words[:2] == ["$", "funicular"]
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("funicular", run_name="__main__")
        assert end.value.code == 0, line
    assert (toy / "out" / "model.safetensors").exists()


def test_what_the_site_is_made_with_is_pinned() -> None:
    """Whatever the extra `docs` asks for is in the lock file of `make docs`; CI builds the site."""
    extra = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    asked = set(re.findall(r'"([\w-]+)', extra))
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements-docs.lock").read_text(), re.MULTILINE))
    assert asked
    assert asked <= pinned
    assert "make docs" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_api_page_names_what_exists() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert len(named) > 10
    # What belongs to a framework that is not installed cannot be imported.
    absent = [name for name in ("lightning", "transformers", "accelerate") if importlib.util.find_spec(name) is None]
    named = [name for name in named if not any(name.startswith(f"funicular.integrations.{one}") for one in absent)]
    public = {pkgutil.resolve_name(name) for name in named}
    unnamed = {
        "Error",
        "__version__",
        "BudgetError",
        "StorageError",
        "UsageError",
        "RuntimeFailure",
    }  # of funicular.errors
    assert [name for name in funicular.__all__ if name not in unnamed and getattr(funicular, name) not in public] == []


def test_every_page_is_in_the_site() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES[1:] if f": {page.name}" not in site] == []
