"""What Hugging Face's Trainer takes of host memory to save and to resume, beyond the plan: two frames, and no copy of weights or states."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import cgroups
import children
import facts
import forks
from conftest import CUDA
from twin import World

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs it")

pytestmark = pytest.mark.skipif(CUDA, reason="a CUDA context takes host memory of its own")
MIB = 1 << 20
#: Layers of 4 MiB each, whose weights take 96 MiB, and their states twice that.
LAYERS, LAYER = 24, 4 * MIB
#: Buffers in which a load checks what it has read, as large for any model; and what Python takes for the first time.
BESIDE = 36 * MIB
READY = "import torch, torch._dynamo, funicular, trainer_runs, funicular.integrations.transformers; torch.set_num_threads(1)"
CODE = """
import os, sys
sys.path[:0] = {folders!r}
import transformers
from trainer_runs import Tokens, arguments
from funicular.integrations.transformers import OffloadMixin, offloaded
import funicular
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers={layers}, num_attention_heads=4, max_position_embeddings=32,
)
{broken}
args = arguments({out!r}, max_steps=2, save_strategy="no", eval_strategy="no")
model = transformers.LlamaForCausalLM(config)
run = offloaded(transformers.Trainer)(model, args, train_dataset=Tokens(), policy={policy!r})
run.train()
sizes = [sum(p.nbytes for p in run.model.parameters()), funicular.stats(run.model).budgets["nvme"].used]
with open({group!r}, "w") as procs:
    procs.write(str(os.getpid()))  # what the plan takes is there: it stays where it was counted
run._save_checkpoint(run.model, None)
print("saved", *sizes, flush=True)
run.train(resume_from_checkpoint=True)
print("resumed", run.state.global_step, flush=True)
os._exit(0)  # Python's own end touches all that the fork shares with its parent
"""
#: The Trainer's own way to save weights, which collects them first; and a load that makes copies.
BROKEN = {
    "": "",
    "save": "OffloadMixin._save = lambda self, out, state_dict=None: transformers.Trainer._save(self, out, {k: v.clone() for k, v in self.model.state_dict().items()})",
    # As many bytes as weights and both moments. Of one copy, some takes memory that was freed before the group counted.
    "load": "OffloadMixin._load_optimizer_and_scheduler = lambda self, path: vars(self).update(kept=[p.detach().clone() for _ in range(3) for p in self.model.parameters()])",
}


@pytest.mark.parametrize("broken", BROKEN)
def test_saves_and_resumes(broken: str, nvme_world: World, tmp_path: Path):
    policy = {
        "device": "host", "budget": {"hbm": f"{4 * LAYER}B", "host": "48MiB", "nvme": "1GiB"}, "nvme": {"paths": list(nvme_world.paths)},
        "params": {"tier": "nvme"}, "optimizer": {"tier": "nvme"},
    }  # fmt: skip
    with cgroups.limited(2 * LAYER + BESIDE) as group:
        code = CODE.format(
            folders=children.FOLDERS,
            layers=LAYERS,
            out=str(tmp_path),
            policy=policy,
            group=str(group / "cgroup.procs"),
            broken=BROKEN[broken],
        )
        process = forks.python(code, READY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        status, out, err = children.finish(process)
        facts.eventually(lambda: not (group / "cgroup.procs").read_text())
    lines = [line for line in out.splitlines() if line.startswith(("saved", "resumed"))]
    if broken:
        assert status == -9, f"{status}\n{out}\n{err}"
        assert len(lines) == (broken == "load")
        return
    assert status == 0, err
    assert len(lines) == 2
    weights, used = map(int, lines[0].split()[1:])
    assert min(weights, used - weights) > 2 * (2 * LAYER + BESIDE)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
