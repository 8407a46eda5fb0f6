"""Pre-train a byte-level transformer on Python's standard library with Lightning's strategy "funicular".

``--resume CHECKPOINT`` goes on from one of the checkpoints that the run has left in ``--out``. Needs lightning.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import funicular
from funicular.integrations.lightning import FunicularStrategy, StatsCallback
from hf_finetune import Rows, bytes_of_python
from transformer import Config, Transformer


class Pretraining(lightning.LightningModule):
    """The next byte's loss."""

    def __init__(self, config: Config, steps: int) -> None:
        super().__init__()
        self.model = Transformer(config)
        self.steps = steps

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        rows = batch["input_ids"]
        loss = self.model(rows[:, :-1], rows[:, 1:])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        opt = funicular.AdamW(self.parameters(), lr=3e-4, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            opt, 3e-4, total_steps=self.steps, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> Any:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="host", help="a file, a preset's name, or a DeepSpeed configuration")
    parser.add_argument("--out", default="pretraining")
    parser.add_argument("--resume")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    lightning.seed_everything(1)
    module = Pretraining(Config(dim=options.width, layers=options.layers, hidden=3 * options.width), options.steps)
    data = torch.utils.data.DataLoader(Rows(bytes_of_python(16 << 20), options.length), batch_size=options.rows)
    trainer = lightning.Trainer(
        strategy=FunicularStrategy(options.policy), accelerator="gpu" if torch.cuda.is_available() else "cpu", devices=1,
        max_steps=options.steps, gradient_clip_val=1.0, default_root_dir=options.out, log_every_n_steps=10, enable_model_summary=False,
        callbacks=[ModelCheckpoint(options.out, filename="{step}", every_n_train_steps=options.save_every, save_top_k=-1), StatsCallback()],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=options.resume)
    return trainer


if __name__ == "__main__":
    trainer = main()
