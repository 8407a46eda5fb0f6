"""What cannot work is refused before anything is taken: under a cgroup's limit, and beside other runs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import cgroups
import forks

MIB = 1 << 20

_MODEL = """
import gc, json, sys, torch, funicular
from torch import nn
def build(layers, width):
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    return model.to(torch.bfloat16)
"""

_REFUSED = (
    _MODEL
    + """
model = build(int(sys.argv[1]), 2048)
try:
    funicular.offload(model, json.loads(sys.argv[2]))
except funicular.BudgetError as e:
    print(e)
    # Nothing was touched.
    assert all(type(p) is nn.Parameter and p.isfinite().all() for p in model.parameters())
"""
)

_TRAINED = (
    _MODEL
    + """
policy = json.loads(sys.argv[2])
model = build(int(sys.argv[1]), 2048)
gc.collect()
funicular.offload(model, policy)
opt = funicular.AdamW(model.parameters(), lr=1e-4)
x = torch.randn(1, 2048, dtype=torch.bfloat16)
for _ in range(3):
    model(x).float().square().mean().backward()
    opt.step()
    opt.zero_grad()
sum(p.detach().float().sum().item() for p in model.parameters())
stats = funicular.stats(model)
budget = stats.budgets["host"]
assert budget.peak <= budget.limit
print("trained", stats.budgets["nvme"].used)
"""
)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUNICULAR_DEVICE", "host")


@pytest.mark.usefixtures("no_gpu")
class TestCgroup:
    """A limit of 1 GiB, which a plan of 1.5 GiB does not fit."""

    LAYERS = "28"  # of 4 Mi parameters: 16 bytes each, frames included, are 1.75 GiB

    def test_a_plan_larger_than_the_limit_is_refused_with_numbers_and_ways_out(self) -> None:
        with cgroups.limited(1024 * MIB) as group:
            done = cgroups.run(group, _REFUSED, self.LAYERS, "{}")
        assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
        message = done.stdout
        assert message.startswith("FN-E202")
        for part in ("the plan needs 1.6 GiB", "this cgroup allows", f"limit 1.0 GiB at {group}", "the machine has"):
            assert part in message, message
        ways = (
            "Set nvme.paths (",
            'or set nvme.paths and optimizer.tier and params.tier = "nvme"',
            "or raise the limit at",
        )
        for way in ways:
            assert way in message, message

    def test_frames_are_host_memory_where_the_processor_computes(self) -> None:
        policy = {
            "budget": {"hbm": "800MiB", "host": "400MiB"},
            "params": {"tier": "host"},
            "optimizer": {"tier": "host"},
        }
        with cgroups.limited(1024 * MIB) as group:
            done = cgroups.run(group, _REFUSED, "6", json.dumps(policy))
            refused = cgroups.run(group, _REFUSED, self.LAYERS, json.dumps({**policy, "budget": {"host": "900MiB"}}))
        assert done.stdout == "", "48 MiB of frames are all that is needed"
        assert "FN-E202" in refused.stdout, refused

    def test_what_is_admitted_is_never_killed(self, disk: str) -> None:
        policy = {"nvme": {"paths": [disk]}}
        with cgroups.limited(1536 * MIB) as group:
            done = cgroups.run_whole(group, _TRAINED, self.LAYERS, json.dumps(policy))
        assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
        word, on_disk = done.stdout.split()
        assert word == "trained"
        assert int(on_disk) > 256 * MIB, "it would have fitted anyway"


_HOLDER = """
import sys, torch, funicular
from torch import nn
# Its gradients and states, 14 bytes per parameter, are not touched before the first step.
model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(24)]).to(torch.bfloat16)
funicular.offload(model, {"device": "host"})
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("no_gpu")
def test_runs_that_share_memory_know_of_each_other(tmp_path: Path) -> None:
    """Both fit alone; the second is told of the first, whose memory is not taken yet."""
    with cgroups.limited(2560 * MIB) as group:
        enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        first = forks.python(enter + _HOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "ready\n"
            done = cgroups.run(group, _REFUSED, "24", "{}")
        finally:
            first.communicate("")
        alone = cgroups.run(group, _REFUSED, "24", "{}")
    assert done.returncode == 0, done.stderr
    assert "FN-E202" in done.stdout, done.stdout
    assert f"process {first.pid} has planned" in done.stdout, done.stdout
    assert alone.stdout == "", "without the first it fits"
