"""Hugging Face's Trainer on several ranks: the bits of one process that runs each rank's batches in turn."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import funicular
import several
from conftest import CUDA
from twin import World

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

import trainer_ranks
from trainer_ranks import READY, SIZE, check, reference
from trainer_runs import llama, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(CUDA, reason="their random numbers are those of processors"),
]


def test_killed_and_resumed(host_world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Both ranks are killed at step 7, and others go on from step 6; one rank may go on too, and is told what differs."""
    policy, out = host_world.policy(llama()), tmp_path / "ranks"
    killed = several.Ranks(SIZE, "trainer_ranks:train", str(out), policy, 7, ready=READY)
    try:
        plain = reference(tmp_path / "plain")
        ends = killed.wait()
    finally:
        killed.end()
    assert all(status not in (0, None) for status, _ in ends), ends
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-3", "checkpoint-6"]
    names = {path.name for path in (out / "checkpoint-6").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "funicular.json", "trainer_state.json"}
    assert names >= {"rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"}
    found = several.Ranks(SIZE, "trainer_ranks:train", str(out), policy, 0, True, ready=READY).results()
    check(plain, found, 6)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-12", "checkpoint-9"]
    alone = trainer(out, policy)
    with caplog.at_level(logging.WARNING, "funicular"):
        alone._load_rng_state(str(out / "checkpoint-12"))
    assert "FN-W410" in caplog.text
    assert "saved by 2 ranks, and this run has 1" in caplog.text
    funicular.unwrap(alone.model)


def test_refused(host_world: World, tmp_path: Path):
    """Settings that each rank would carry out by itself, by name; and what fails on one rank in a save fails on all."""
    checkpoint = tmp_path / "checkpoint-1"
    run = trainer(tmp_path, None, max_steps=1, save_steps=1)
    run.train()
    refused = [
        f"SGD on {SIZE} ranks",
        f"{checkpoint} was saved without funicular",
        "the model was offloaded as rank 0 of 1",
    ]
    policy = host_world.policy(llama())
    first, second = several.run(SIZE, "trainer_ranks:refused", str(checkpoint), policy, ready=READY)
    for text, *both in zip(refused, first, second, strict=False):
        assert all(said.startswith(f"FN-E141 {text}") for said in both)
    told, other = first[len(refused) :], second[len(refused) :]
    assert (told[0], other[2]) == ("TypeError: 'NoneType' object is not callable",) * 2
    for rank, said in enumerate((other[0], told[2])):
        assert said.startswith(f"RuntimeFailure: FN-E721 rank {rank} failed when it saved")
    assert told[1] == told[3] == other[1] == other[3] == "False"  # the checkpoint does not count
    assert told[4:] == other[4:]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers(launcher: str, host_world: World, tmp_path: Path):
    """As a user starts it; killed at step 7, and started again."""
    pytest.importorskip("peft", reason="make test-integrations has it, and time")
    if launcher == "accelerate" and transformers.__version__ < "5":
        pytest.skip("with the newest versions")
    policy, out = host_world.policy(llama()), tmp_path / "ranks"
    module = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE)]
    if launcher == "accelerate":
        # As for GPUs: for processes on the CPU it wants MPI. The script's arguments say where it computes.
        module = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(SIZE), "--num_machines", "1"]
        module += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", *module, trainer_ranks.__file__, str(out), json.dumps(policy)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    for kill in ("7", "0"):
        done = subprocess.run([*command, kill], check=False, capture_output=True, text=True, env=env)
        assert (done.returncode == 0) == (kill == "0"), done.stderr
    found = [torch.load(out / f"{rank}.found", weights_only=False) for rank in range(SIZE)]
    check(reference(tmp_path / "plain"), found, 6)
