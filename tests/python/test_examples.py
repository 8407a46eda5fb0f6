"""What the README shows, run as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funicular
from conftest import CUDA, DEVICE
from models import Stack

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("device", ["auto", "cuda:0"] if CUDA else ["auto"])
def test_demo(device: str, tmp_path: Path):
    """Small, but all of it: trained, compared with the resident run, budgets kept."""
    options = {
        "--steps": "3",
        "--layers": "8",
        "--batch": "2",
        "--seq": "16",
        "--device": device,
        "--disk": str(tmp_path),
    }
    env = os.environ if CUDA else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    words = [word for pair in options.items() for word in pair]
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), *words]
    done = subprocess.run(demo, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: every loss and every weight is equal to the last bit, and every budget was kept" in done.stdout
    assert "largest difference of the loss curves over 3 steps: 0.0" in done.stdout
    assert not any(tmp_path.iterdir())


def test_the_lines_of_the_readme(
    tmp_path: Path, disk: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With a model, a policy and data around them."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    policy = f'device = "{DEVICE}"\n[budget]\nhbm = "64MiB"\nhost = "1GiB"\n[nvme]\npaths = ["{disk}"]\n'
    (tmp_path / "policy.toml").write_text(policy)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Stack().to("cuda" if CUDA else "cpu")
    width = next(model.parameters()).shape[1]
    x = torch.randn(4, width, device="cuda" if CUDA else "cpu")

    class Task(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.model = model.layers, model

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.model(x) - y).square().mean()

    before = [p.detach().clone() for p in model.parameters()]
    place = {"model": Task(), "x": x, "y": x}
    exec(code[1], place)
    after = list(place["model"].parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "step" in capsys.readouterr().out
    funicular.unwrap(place["model"])
