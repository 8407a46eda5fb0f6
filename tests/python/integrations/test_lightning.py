"""Lightning over an offloaded model: the bits of the plain strategy, its checkpoints, loops of one's own, what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import funicular
import several
from conftest import CUDA
from twin import World

lightning = pytest.importorskip("lightning.pytorch", reason="make test-integrations has it")
pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

import lightning_runs
from lightning_runs import InTurn, Lit, Manual, fitted, loaders, trainer

from funicular.integrations.lightning import FunicularStrategy, StatsCallback
from trainer_ranks import READY, SIZE
from trainer_runs import llama, weights

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _order_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning sets this on a GPU; the next test is to find what was there."""
    if CUDA:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def equal(a: Any, b: Any) -> bool:
    one, other = weights(a), weights(b)
    return a.losses == b.losses and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_like_the_plain_strategy(precision: str, two_worlds: World, tmp_path: Path):
    build = lambda paged: Lit(paged, dropout=True)
    policy = two_worlds.policy(Lit(True))
    plain = fitted(tmp_path, None, build, precision=precision)
    paged = fitted(tmp_path, policy, build, precision=precision)
    assert len(paged.losses) == 36
    assert equal(plain, paged)
    assert funicular.stats(paged).steps == 12


CHILD = """
import sys, os, json, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from pathlib import Path
import lightning_runs as t
from lightning.pytorch.callbacks import ModelCheckpoint, Callback
class Kill(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7: os._exit(9)
folder = Path(sys.argv[1])
keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
t.fitted(folder, json.loads(sys.argv[2]), enable_checkpointing=True, callbacks=[keep, Kill()])
"""


def test_killed_and_resumed(two_worlds: World, tmp_path: Path):
    """By the checkpoint callback, which keeps folders as it keeps files; killed at step 7, gone on with from step 6.

    The plain strategy goes on from its own checkpoint, since Lightning begins an epoch's data anew.
    """
    import json

    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path / "p", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fitted(tmp_path, None, enable_checkpointing=True, callbacks=[keep])
    plain = fitted(tmp_path, None, ckpt_path=str(tmp_path / "p" / "step=6.ckpt"))
    policy = two_worlds.policy(Lit(True))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    killed = [sys.executable, "-c", CHILD, str(tmp_path / "c"), json.dumps(policy)]
    done = subprocess.run(killed, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 9, done.stderr
    assert sorted(path.name for path in (tmp_path / "c").glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"]
    resumed = fitted(tmp_path, policy, ckpt_path=str(tmp_path / "c" / "step=6.ckpt"))
    assert equal(plain, resumed)
    assert funicular.stats(resumed).steps == 6


@pytest.mark.skipif(CUDA, reason="several processes on the CPU")
def test_on_ranks(host_world: World, tmp_path: Path):
    """Two ranks are killed at step 7, and others go on from step 6: the bits of one process that runs their batches in turn."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    policy, out = host_world.policy(Lit(True)), tmp_path / "c"
    killed = several.Ranks(SIZE, "lightning_runs:on_rank", str(out), policy, "", ready=READY)
    keep = ModelCheckpoint(tmp_path / "p", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    try:
        fitted(tmp_path, None, InTurn, enable_checkpointing=True, callbacks=[keep])
        plain = fitted(tmp_path, None, InTurn, ckpt_path=str(tmp_path / "p" / "step=6.ckpt"))
        ends = killed.wait()
    finally:
        killed.end()
    assert all(status not in (0, None) for status, _ in ends), ends
    assert sorted(path.name for path in out.glob("*.ckpt")) == ["step=3.ckpt", "step=6.ckpt"], ends
    checkpoint = str(out / "step=6.ckpt")
    same_on_ranks(plain, several.run(SIZE, "lightning_runs:on_rank", str(out), policy, checkpoint, ready=READY))


def same_on_ranks(plain: Any, found: list[dict[str, Any]]) -> None:
    one = weights(plain)
    for rank, said in enumerate(found):
        assert [losses[rank] for losses in plain.losses] == said["losses"]
        assert all(torch.equal(one[name], said["weights"][name]) for name in one)
        assert said["size"] == SIZE
    assert found[0]["losses"] != found[1]["losses"]


@pytest.mark.parametrize(
    "launcher", [["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []], ids=["torchrun", "own"]
)
def test_launchers(launcher: list[str], host_world: World, tmp_path: Path):
    if CUDA:
        pytest.skip("several processes on the CPU")
    import json

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        *launcher,
        lightning_runs.__file__,
        str(tmp_path),
        json.dumps(host_world.policy(Lit(True))),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    plain = fitted(tmp_path, None, InTurn)
    same_on_ranks(plain, [torch.load(tmp_path / f"{rank}.found", weights_only=True) for rank in range(SIZE)])


@pytest.mark.skipif(CUDA, reason="several processes on the CPU")
def test_refused_on_ranks(host_world: World, tmp_path: Path):
    """Each by name, before anything is trained."""
    trainer(tmp_path, None, max_steps=1).fit(Lit(False), *loaders())
    run = trainer(tmp_path, None, max_steps=1)
    run.fit(Lit(False), *loaders())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    policy = host_world.policy(Lit(True))
    for said in several.run(SIZE, "lightning_runs:refused", str(tmp_path / "plain.ckpt"), policy, ready=READY):
        expected = [
            "ReferenceAdamW on 2 ranks",
            "another strategy on 2 ranks",
            "num_nodes=2",
            "started 2 processes, and devices=1",
        ]
        expected += ["states of 2 optimizers on 2 ranks", "sync_batchnorm=True", "rank 0 of 1"]
        assert len(said) == len(expected)
        for text, line in zip(expected, said, strict=True):
            assert line.startswith("FN-E141"), (text, said)
            assert text in line, (text, said)


def test_checkpoints(host_world: World, tmp_path: Path):
    """The best are kept, others removed; one that was not written to its end is refused; `test` and `validate` read them."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(tmp_path / "c", monitor="val", save_top_k=1, save_last=True)
    module = fitted(tmp_path, host_world.policy(Lit(True)), enable_checkpointing=True, callbacks=[keep])
    there = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert len(there) == 2
    assert "last.ckpt" in there
    names = {path.name for path in (tmp_path / "c" / "last.ckpt").iterdir()}
    assert names >= {"model.safetensors", "optimizer.safetensors", "funicular.json", "lightning.ckpt"}
    assert (tmp_path / "c" / "last.ckpt" / "lightning.ckpt").stat().st_size < 50_000
    fresh = Lit(True)
    funicular.load(tmp_path / "c" / "last.ckpt", fresh)
    kept = weights(fresh)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    run = trainer(tmp_path, "host")
    run.test(module, loaders()[1], ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), weights(module).values()))
    (tmp_path / "c" / "last.ckpt" / "lightning.ckpt").unlink()
    with pytest.raises(funicular.UsageError, match=r"FN-E404.*last\.ckpt.*lightning\.ckpt"):
        trainer(tmp_path, "host").validate(module, loaders()[1], ckpt_path=str(tmp_path / "c" / "last.ckpt"))


def test_from_a_checkpoint_of_a_plain_strategy(host_world: World, tmp_path: Path):
    lightning.seed_everything(3)
    plain, run = Lit(False), trainer(tmp_path, None, max_steps=6)
    plain.configure_optimizers = lambda: torch.optim.AdamW(plain.parameters(), lr=1e-2)
    run.fit(plain, *loaders())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    paged = Lit(True)
    paged.configure_optimizers = lambda: funicular.AdamW(paged.parameters(), lr=1e-2)
    run = trainer(tmp_path, host_world.policy(Lit(True)), max_steps=7)
    run.fit(paged, *loaders(), ckpt_path=str(tmp_path / "plain.ckpt"))
    assert {float(s["step"]) for s in run.optimizers[0].state.values()} == {7.0}


def test_manual_optimization(two_worlds: World, tmp_path: Path):
    """Two optimizers over one model; their states are saved in torch's form."""
    more = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "max_steps": 8, "val_check_interval": None}
    plain = fitted(tmp_path, None, Manual, **more)
    policy = two_worlds.policy(Manual(True))
    paged = fitted(tmp_path, policy, Manual, **more)
    assert equal(plain, paged)
    paged.trainer.save_checkpoint(tmp_path / "c.ckpt")
    assert not (tmp_path / "c.ckpt" / "optimizer.safetensors").exists()
    plain.trainer.save_checkpoint(tmp_path / "p.ckpt")
    longer = fitted(tmp_path, None, Manual, ckpt_path=str(tmp_path / "p.ckpt"), **{**more, "max_steps": 12})
    again = fitted(tmp_path, policy, Manual, ckpt_path=str(tmp_path / "c.ckpt"), **{**more, "max_steps": 12})
    assert equal(longer, again)


class OnMeta(Lit):
    """Its model has no memory until it is offloaded."""

    def __init__(self, folder: Path, policy: Any) -> None:
        lightning.LightningModule.__init__(self)
        self.folder, self.policy, self.paged, self.losses = folder, policy, True, []
        self.model: nn.Module | None = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.model is None:
            with accelerate.init_empty_weights(include_buffers=False):
                self.model = llama(attention_dropout=0.0)
            self.model.tie_weights()
            funicular.offload(self.model, self.policy, checkpoint=self.folder)


def test_on_meta(two_worlds: World, tmp_path: Path):
    llama().save_pretrained(tmp_path / "weights")
    plain = fitted(tmp_path, None)
    policy = two_worlds.policy(llama())
    module = fitted(tmp_path, policy, lambda paged: OnMeta(tmp_path / "weights", policy))
    assert equal(plain, module)


def test_configure_model_makes_it_on_the_cpu():
    """Lightning has other strategies make it on their device, whose values differ in their last bits, and whose memory it may not fit into."""
    strategy = FunicularStrategy("host")
    strategy.parallel_devices = [torch.device("meta")]
    with strategy.tensor_init_context():
        made = llama()
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"cpu"}


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FUNICULAR_BUDGET__HOST", "256MiB")
    module = fitted(tmp_path, None, lambda paged: Lit(True), strategy="funicular", max_steps=2)
    assert funicular.stats(module).steps == 2


class Logger(lightning.loggers.logger.DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append(metrics)


def test_figures(host_world: World, tmp_path: Path):
    logger = Logger()
    call = {"logger": logger, "callbacks": [StatsCallback(peak_flops=1e12)], "max_steps": 3}
    fitted(tmp_path, host_world.policy(Lit(True)), **call)
    lines = [line for line in logger.lines if "funicular/mfu" in line]
    assert len(lines) >= 3
    assert all(line["funicular/tokens_per_second"] > 0 and line["funicular/host_gib"] > 0 for line in lines)
