"""A loop with accelerate: plain, offloaded, on several ranks, and as the reference of so many."""

from __future__ import annotations

from typing import Any

import accelerate
import torch
from torch import nn

import funicular
from funicular.integrations.accelerate import prepare
from funicular.reference import ReferenceAdamW, backward_of_ranks
from models import CUDA
from trainer_ranks import Turns, as_launched
from trainer_runs import Tokens, llama, weights

#: rows of a rank in a batch
ROWS = 2


class Loop:
    """Two batches a step, clipped, on a schedule. ``ranks`` are those that one process runs in turn."""

    def __init__(self, policy: Any, ranks: int = 1, rows: int = 48, **more: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        accelerate.utils.set_seed(5)
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=not CUDA, **more)
        model = llama()
        kind = ReferenceAdamW if policy is None else funicular.AdamW
        opt = kind(model.parameters(), lr=1e-2, weight_decay=0.1)
        if policy is None:
            self.model, self.opt = self.accelerator.prepare(model, opt)
        else:
            self.model, self.opt = prepare(self.accelerator, model, opt, policy)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, total_iters=12)
        data = torch.utils.data.DataLoader(Tokens(rows), batch_size=ROWS * ranks)
        self.data, self.schedule = self.accelerator.prepare(data, schedule)
        self.losses: list[Any] = []
        self.ranks = ranks
        self.turns: Turns | None = None

    def run(self, steps: int, first: int = 0) -> Loop:
        self.model.train()
        for number, batch in enumerate(self.data):
            if not 2 * first <= number < 2 * (first + steps):
                continue
            if number == 0 and self.accelerator.num_processes > 1:
                torch.manual_seed(100 + self.accelerator.process_index)
            with self.accelerator.accumulate(self.model):
                if self.ranks == 1:
                    loss = self.model(**batch, use_cache=False).loss
                    self.losses.append(loss.item())
                    self.accelerator.backward(loss)
                else:
                    self.losses.append(self.backward_in_turn(batch))
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                    self.losses.append(float(norm))
                self.opt.step()
                for _ in range(self.ranks):  # accelerate does so on each rank, for as many as there are
                    self.schedule.step()
                self.opt.zero_grad()
        return self

    def backward_in_turn(self, batch: Any) -> list[float]:
        """Run each rank's part of a batch; its losses."""
        self.turns = self.turns or Turns(self.ranks)
        self.turns.catch_up()
        found: list[float] = []

        def loss(rank: int) -> torch.Tensor:
            assert self.turns is not None
            part = {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in batch.items()}
            with self.turns.of(rank):
                loss = self.model(**part, use_cache=False).loss
            found.append(loss.item())
            return loss / 2

        backward_of_ranks(self.model.parameters(), [lambda rank=rank: loss(rank) for rank in range(self.ranks)])
        torch.set_rng_state(self.turns.states[0])
        return found

    def module(self) -> nn.Module:
        """The model itself."""
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module


def on_rank(policy: Any, folder: str, steps: int, first: int) -> dict[str, Any]:
    """Train on this rank: until it saves, or from where another process has saved."""
    as_launched()
    loop = Loop(policy, rows=12 * 2 * ROWS * 2)
    if first:
        loop.accelerator.load_state(folder)
    loop.run(steps, first)
    if not first:
        for _ in range(2):
            loop.accelerator.save_state(folder)
    state = loop.accelerator.get_state_dict(loop.model)
    ranks = funicular.stats(loop.module()).ranks
    return {
        "losses": loop.losses, "weights": weights(loop.module()), "size": ranks and ranks.size, "kind": type(loop.model).__name__,
        "states": {name: state[name].clone() for name in weights(loop.module())}, "rate": loop.schedule.get_last_lr(),
    }  # fmt: skip
