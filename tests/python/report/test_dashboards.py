"""``to_dict`` has the names that docs/stats.md lists, and the recipes of docs/dashboards.md do what they say."""

from __future__ import annotations

import csv
import html
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trace import CAUSES, LINKS, trained
from torch import nn

import funicular
from models import WIDTH, Stack
from twin import World

DOCS = Path(__file__).parents[3] / "docs"
PLACEHOLDERS = {"LINK": LINKS, "CAUSE": CAUSES, "TIER": {"hbm", "host", "nvme"}}
#: with several ranks there are these besides
RANKED = {"LINK": {"exchange"}, "CAUSE": {"exchange", "peers_grads", "peers_step", "peers_update"}, "TIER": set()}


def documented(*, ranked: bool = False) -> set[str]:
    """The names in the table of docs/stats.md, each placeholder filled in."""
    section = (DOCS / "stats.md").read_text().split("\n## to_dict\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    for placeholder, of_all in PLACEHOLDERS.items():
        values = of_all | RANKED[placeholder] if ranked else of_all
        names = {name.replace(placeholder, value) for name in names for value in values}
    return names


@pytest.mark.parametrize("steps", [0, 2])
def test_names_are_documented(host_world: World, steps: int) -> None:
    figures = funicular.stats(trained(host_world, steps=steps).model).to_dict()
    assert set(figures) == documented()
    assert json.loads(json.dumps(figures)) == figures
    assert all(value is None or isinstance(value, (int, float, str)) for value in figures.values())
    assert (figures["step/seconds"] is None) == (steps == 0)
    assert figures["steps"] == steps


def test_figures_are_those_of_stats(two_worlds: World) -> None:
    stats = funicular.stats(trained(two_worlds).model)
    figures = stats.to_dict()
    assert figures["binding"] == stats.binding
    assert stats.step is not None
    assert figures["step/stall_seconds/copy"] == stats.step.stalls["copy"]
    assert figures["links/nvme_read/bytes"] == stats.links["nvme_read"].bytes
    assert figures["budgets/host/peak"] == stats.budgets["host"].peak
    assert figures["prefetch/hits"] == stats.prefetch.hits


class Board:
    """Stands in for TensorBoard, W&B and Prometheus: names and values in the order they came."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def writer(self, folder: str) -> SimpleNamespace:
        return SimpleNamespace(add_scalar=lambda name, value, step: self.told.append((name, value)))

    def init(self, project: str) -> SimpleNamespace:
        return SimpleNamespace(log=lambda values, step: self.told.extend(values.items()))

    def gauge(self, name: str, text: str, labels: list[str]) -> SimpleNamespace:
        return SimpleNamespace(labels=lambda one: SimpleNamespace(set=lambda value: self.told.append((one, value))))


def recipes() -> dict[str, str]:
    page = (DOCS / "dashboards.md").read_text()
    return dict(re.findall(r"\n## ([^\n]+)\n\n<!-- tested by: [^\n]*\n```python\n(.*?)```", page, flags=re.DOTALL))


@pytest.mark.parametrize("name", ["TensorBoard", "Weights & Biases", "CSV", "Prometheus"])
def test_recipe(name: str, host_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(recipes()) == 4
    board = Board()
    served: list[int] = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=board.writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=board.init))
    prometheus = SimpleNamespace(Gauge=board.gauge, start_http_server=served.append)
    monkeypatch.setitem(sys.modules, "prometheus_client", prometheus)
    monkeypatch.chdir(tmp_path)
    model: nn.Module = Stack()
    funicular.offload(model, host_world.policy(model))
    opt = funicular.AdamW(model.parameters())

    def train_step() -> None:
        model(torch.ones(2, WIDTH, device=host_world.torch_device)).square().mean().backward()
        opt.step()
        opt.zero_grad()

    exec(recipes()[name], {"funicular": funicular, "model": model, "train_step": train_step, "steps": 2})
    monkeypatch.chdir(DOCS)
    if name == "CSV":
        rows = list(csv.DictReader((tmp_path / "stats.csv").read_text().splitlines()))
        assert [row["steps"] for row in rows] == ["1", "2"]
        assert set(rows[0]) == set(funicular.stats(model).to_dict())
    else:
        assert [value for one, value in board.told if one.removeprefix("funicular/") == "steps"] == [1, 2]
        assert served == ([8000] if name == "Prometheus" else [])
        assert ("binding" in {one.removeprefix("funicular/") for one, _ in board.told}) == (name == "Weights & Biases")


def test_notebooks_show_what_print_shows(host_world: World):
    model = Stack()
    funicular.offload(model, host_world.policy(model))
    said = funicular.stats(model)
    assert said._repr_html_() == f'<pre style="line-height: 1.3">{html.escape(str(said))}</pre>'
