"""What `make demo` runs, at toy size. What README and docs show is run by test_documents.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CUDA

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("device", ["auto", "cuda:0"] if CUDA else ["auto"])
def test_demo(device: str, tmp_path: Path):
    """Small, but all of it: trained, compared with the resident run, budgets kept."""
    options = {
        "--steps": "3",
        "--layers": "5",
        "--batch": "2",
        "--seq": "16",
        "--device": device,
        "--disk": str(tmp_path),
    }
    # One thread for torch: what it computes here is too little to share, and waiting threads would keep the processors busy.
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if CUDA else {"CUDA_VISIBLE_DEVICES": ""})
    words = [word for pair in options.items() for word in pair]
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), *words]
    done = subprocess.run(demo, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK: every loss and every weight is equal to the last bit, and every budget was kept" in done.stdout
    assert "largest difference of the loss curves over 3 steps: 0.0" in done.stdout
    assert not any(tmp_path.iterdir())
