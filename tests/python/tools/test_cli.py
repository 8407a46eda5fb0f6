"""The command line as the wheel installs it: the same program, with Python around it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import funicular

BENCH = ["bench", "--device", "host", "--no-sweep", "--size", "16MiB"]


def start(arguments: list[str], directory: Path) -> subprocess.Popen[str]:
    """``python -m funicular`` in a directory of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "funicular", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(funicular.__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_removes_its_files_and_shows_no_traceback(disk: str, number: int) -> None:
    process = start([*BENCH, "--seconds", "600"], Path(disk))
    while not os.listdir(disk) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert (process.returncode, os.listdir(disk)) == (130, []), err
    assert "FN-E106" in err, err
    assert "Traceback" not in err, err


def test_the_benchmark_runs_and_the_doctor_knows_this_python(disk: str) -> None:
    process = start([*BENCH, "--quick", "--rounds", "2", "--seconds", "0.3", "--json", "r.json"], Path(disk))
    out, err = process.communicate()
    assert process.returncode == 0, err
    report = json.loads(Path(disk, "r.json").read_text())
    assert "adamw_cpu" in out
    assert {hop["name"] for hop in report["hops"]} >= {"adamw_cpu", "host_to_device"}
    process = start(["doctor", "--json", "--device", "host"], Path(disk))
    out, err = process.communicate()
    assert process.returncode in (0, 1), err
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert checks["torch"]["found"].split(",")[0] == torch.__version__
