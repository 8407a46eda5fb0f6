"""Runs of Lightning's trainer: plain, offloaded, on several ranks, and as the reference of so many."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import funicular
from funicular.integrations.lightning import FunicularStrategy
from funicular.reference import ReferenceAdamW, backward_of_ranks
from models import CUDA
from trainer_ranks import SIZE, as_launched, told_by
from trainer_runs import Tokens, llama, weights

SEED = 3


class Lit(lightning.LightningModule):
    """A language model, with the optimizer of either side."""

    def __init__(self, paged: bool, dropout: bool = False) -> None:
        super().__init__()
        self.model = llama(attention_dropout=0.1 if dropout else 0.0)
        self.paged = paged
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch, use_cache=False).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        loss = self.model(**batch, use_cache=False).loss
        self.losses.append(loss.item())
        self.log("val", loss)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        kind = funicular.AdamW if self.paged else ReferenceAdamW
        opt = kind(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, total_iters=12)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(ranks: int = 1) -> tuple[Any, Any]:
    """Data of one process; of one that runs all ranks in turn, in the order in which Lightning deals them out."""
    data, kind = Tokens(), torch.utils.data.DataLoader
    sampler = torch.utils.data.DistributedSampler(data, 1, 0, shuffle=True, seed=SEED) if ranks > 1 else None
    return kind(data, batch_size=2 * ranks, sampler=sampler), kind(Tokens(8), batch_size=2 * ranks)


def trainer(folder: Path, policy: Any, **more: Any) -> Any:
    options: dict[str, Any] = {
        "max_steps": 12, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 8, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder), "num_sanity_val_steps": 0,
        "accelerator": "gpu" if CUDA else "cpu", "devices": 1, "enable_checkpointing": False, "log_every_n_steps": 1,
    }  # fmt: skip
    if policy is not None:
        options["strategy"] = FunicularStrategy(policy)
    return lightning.Trainer(**(options | more))


def fitted(folder: Path, policy: Any, build: Any = Lit, ckpt_path: Any = None, **more: Any) -> Any:
    lightning.seed_everything(SEED)
    module = build(policy is not None)
    run = trainer(folder, policy, **more)
    run.fit(module, *loaders(getattr(build, "ranks", 1)), ckpt_path=ckpt_path)
    return module


class Manual(Lit):
    """A loop of its own, with two optimizers."""

    def __init__(self, paged: bool) -> None:
        super().__init__(paged)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        kind = funicular.AdamW if self.paged else ReferenceAdamW
        params = list(self.parameters())
        return [kind(params[: len(params) // 2], lr=1e-2), kind(params[len(params) // 2 :], lr=1e-3)]

    def training_step(self, batch: Any, index: int) -> None:
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for opt in self.optimizers():
            opt.step()
            opt.zero_grad()


class InTurn(Lit):
    """Runs the batches of all ranks in turn. Lightning deals rows out by turns."""

    ranks = SIZE

    def __init__(self, paged: bool) -> None:
        super().__init__(paged)
        self.losses: list[Any] = []

    def of(self, batch: Any, rank: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(
            **{name: rows[rank :: self.ranks] for name, rows in batch.items()}, use_cache=False
        ).loss
        return loss

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.batch = batch
        return torch.zeros((), requires_grad=True)

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        found: list[float] = []

        def of(rank: int) -> torch.Tensor:
            loss = self.of(self.batch, rank)
            found.append(loss.item())
            return loss / 2

        backward_of_ranks(self.parameters(), [lambda rank=rank: of(rank) for rank in range(self.ranks)])
        self.losses.append(found)

    def validation_step(self, batch: Any, index: int) -> None:
        self.losses.append([self.of(batch, rank).item() for rank in range(self.ranks)])


class Dies(Callback):
    """Kills the process at the end of step 7."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def found_by(module: Any) -> dict[str, Any]:
    """What a test looks at."""
    ranks = funicular.stats(module).ranks
    return {"losses": module.losses, "weights": weights(module), "size": ranks and ranks.size}


def on_rank(out: str, policy: Any, checkpoint: str) -> dict[str, Any]:
    """Train on this rank: until it is killed, or on from a checkpoint."""
    as_launched()
    keep = ModelCheckpoint(out, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    more = {"ckpt_path": checkpoint} if checkpoint else {"enable_checkpointing": True, "callbacks": [keep, Dies()]}
    return found_by(fitted(Path(out), policy, devices=SIZE, **more))


def refused(checkpoint: str, policy: Any) -> list[str]:
    """What each of these is told on this rank."""
    as_launched()
    folder = Path(checkpoint).parent

    def plain(paged: bool) -> Any:
        return Lit(False)

    def alone(paged: bool) -> Any:
        return funicular.offload(Lit(True), policy, group="single")

    def several() -> None:
        found = fitted(
            folder, policy, Manual, devices=SIZE, accumulate_grad_batches=1, gradient_clip_val=None, max_steps=2
        )
        found.trainer.save_checkpoint(folder / "two.ckpt")
        fitted(
            folder,
            policy,
            Manual,
            str(folder / "two.ckpt"),
            devices=SIZE,
            accumulate_grad_batches=1,
            gradient_clip_val=None,
        )

    calls = [
        lambda: fitted(folder, policy, plain, devices=SIZE),
        lambda: fitted(folder, policy, ckpt_path=checkpoint, devices=SIZE),
        lambda: trainer(folder, policy, devices=SIZE, num_nodes=2),
        lambda: torchrun(folder, policy),
        several,
        lambda: fitted(folder, policy, devices=SIZE, sync_batchnorm=True),
        lambda: fitted(folder, policy, alone, devices=SIZE),
    ]
    return [told_by(call) for call in calls]


def torchrun(folder: Path, policy: Any) -> None:
    """A trainer of one device in a process that torchrun has started."""
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    as_launched()  # the trainers before have cleared the environment
    trainer(folder, policy, plugins=[TorchElasticEnvironment()])


if __name__ == "__main__":
    # Started by a launcher, or by Lightning's own.
    torch.set_num_threads(1)
    folder, policy = Path(sys.argv[1]), json.loads(sys.argv[2])
    module = fitted(folder, policy, devices=SIZE)
    torch.save(found_by(module), folder / f"{module.trainer.global_rank}.found")
    module.trainer.strategy.barrier("the end")
    torch.distributed.destroy_process_group()
