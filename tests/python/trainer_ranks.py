"""Hugging Face's Trainer on several ranks, and in one process as the reference of so many."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel

import funicular
from funicular.reference import backward_of_ranks
from several import ordered
from trainer_runs import Tokens, arguments, llama, plain, seen, weights

#: What a process has imported from which these ranks are forked: to import it takes longer than they train.
READY = "import torch, torch._dynamo, funicular, trainer_ranks; torch.set_num_threads(1)"
SIZE = 2
#: Rows of a rank in a batch: twelve steps of two batches on two ranks are one epoch.
ROWS = 2


class Uneven(Tokens):
    """Rows that count as differently many tokens."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        labels = row["labels"].clone()
        labels[: index % 5] = -100
        return {"input_ids": row["input_ids"], "labels": labels}


def options(size: int = 1, **more: Any) -> dict[str, Any]:
    """Training arguments of a rank, or of the one process that has the batches of ``size`` ranks."""
    rows = {"per_device_train_batch_size": ROWS * size, "per_device_eval_batch_size": ROWS}
    return rows | {"average_tokens_across_devices": True, "save_total_limit": 2} | more


def data() -> dict[str, Any]:
    """What the constructor takes."""
    return {"train_dataset": Uneven(12 * 2 * ROWS * SIZE), "eval_dataset": Tokens(8)}


class Turns:
    """Random states of several ranks that one process runs in turn; between steps it has that of rank 0."""

    def __init__(self, size: int) -> None:
        self.states = [torch.Generator().manual_seed(100 + rank).get_state() for rank in range(size)]
        torch.set_rng_state(self.states[0])

    @contextlib.contextmanager
    def of(self, rank: int) -> Iterator[None]:
        torch.set_rng_state(self.states[rank])
        yield
        self.states[rank] = torch.get_rng_state()

    def catch_up(self) -> None:
        """A loader draws a number where it begins: on each rank."""
        now = torch.get_rng_state()
        while not torch.equal(now, self.states[0]):
            for rank in range(len(self.states)):
                with self.of(rank):
                    torch.empty((), dtype=torch.int64).random_()


class OfRanks:
    """Makes of the rows of all ranks the batch of each."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        if len(rows) <= ROWS:  # of an evaluation
            return self.collate(rows)
        return {"ranks": [self.collate(rows[at : at + ROWS]) for at in range(0, len(rows), ROWS)]}


@functools.cache
def in_turn(base: type) -> type:
    """A trainer that runs the batches of all ranks in turn."""

    class InTurn(plain(base)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.data_collator = OfRanks(self.data_collator)
            #: for each batch the losses of all ranks
            self.losses: list[list[torch.Tensor]] = []
            self.turns: Turns | None = None

        def get_batch_samples(self, iterator: Iterator[Any], number: int, *args: Any) -> Any:
            batches = list(itertools.islice(iterator, number))
            parts = [part for batch in batches for part in batch["ranks"]]
            return batches, super().get_batch_samples(iter(parts), len(parts), *args)[1]

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            model.train()
            self.turns = self.turns or Turns(SIZE)
            self.turns.catch_up()
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None

            def loss_of(rank: int) -> Callable[[], torch.Tensor]:
                def loss() -> torch.Tensor:
                    assert self.turns is not None
                    part = self._prepare_inputs(inputs["ranks"][rank])
                    with self.turns.of(rank), self.compute_loss_context_manager():
                        found = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
                    # Of all tokens, which the exchange divides by the number of ranks; or of this rank's rows.
                    return SIZE * found if counted else found / self.args.gradient_accumulation_steps

                return loss

            found = backward_of_ranks(model.parameters(), [loss_of(rank) for rank in range(SIZE)])
            torch.set_rng_state(self.turns.states[0])
            self.losses.append([loss.detach() for loss in found if loss is not None])
            return self.losses[-1][0]

        def said(self) -> list[dict[str, float]]:
            """What ranks log: the mean of each one's sum of losses."""
            lines, done = seen(self), 0
            for line in lines:
                if "loss" in line:
                    sums = [torch.zeros(()) for _ in range(SIZE)]
                    for losses in self.losses[done : done + 2]:
                        for total, loss in zip(sums, losses, strict=True):
                            total += loss
                    done += 2
                    said = torch.stack(sums).mean().item()
                    line["loss"] = round(said, 4) if transformers.__version__ < "5" else said
            return lines

    return InTurn


def reference(out: Path, **more: Any) -> Any:
    """One process that runs the batches of all ranks in turn."""
    run = in_turn(transformers.Trainer)(args=arguments(out, **options(SIZE, **more)), model=llama(), **data())
    run.train()
    return run


@functools.cache
def on_rank(base: type) -> type:
    """A trainer that notes this rank's losses; its random numbers are not those of other ranks."""

    class OnRank(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.losses: list[torch.Tensor] = []

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 0 and not self.losses:
                torch.manual_seed(100 + self.args.process_index)
                if isinstance(args[0], DistributedDataParallel):
                    args[0].register_comm_hook(None, lambda _, bucket: ordered(bucket))
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            self.losses.append(loss.detach().clone())
            return loss

    return OnRank


class Dies(transformers.TrainerCallback):  # type: ignore[misc]
    """Kills the process at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def as_launched() -> None:
    """Have what a launcher leaves in the environment, in a process that is a rank already."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "OMP_NUM_THREADS": "1",
    }


def trainer(out: str, policy: Any, call: Any = None, **more: Any) -> Any:
    """A trainer of this rank."""
    from funicular.integrations.transformers import offloaded

    call = {"model": llama(), **data()} | (call or {})
    return offloaded(on_rank(transformers.Trainer))(args=arguments(out, **options(**more)), policy=policy, **call)


def found_by(run: Any) -> dict[str, Any]:
    """What a test looks at."""
    ranks = funicular.stats(run.model).ranks
    return {
        "losses": torch.stack(run.losses), "said": seen(run), "weights": weights(run.model), "size": ranks and ranks.size,
        "wrapped": run.model_wrapped is run.model, "history": run.state.log_history,
    }  # fmt: skip


def check(plain: Any, found: list[dict[str, Any]], first: int = 0) -> None:
    """Losses of each rank since a step, all log lines, and weights are those of the reference."""
    for rank, said in enumerate(found):
        assert said["size"] == SIZE
        assert said["wrapped"]
        expected = torch.stack([losses[rank] for losses in plain.losses[2 * first :]])
        assert torch.equal(expected, said["losses"])
        assert plain.said() == said["said"]
        one = weights(plain.model)
        assert one.keys() == said["weights"].keys()
        assert all(torch.equal(one[name], said["weights"][name]) for name in one)
    assert not torch.equal(found[0]["losses"], found[1]["losses"])


def train(out: str, policy: Any, kill: int = 0, resume: bool = False, **more: Any) -> dict[str, Any]:
    """Train on this rank."""
    as_launched()
    run = trainer(out, policy, {"callbacks": [Dies(kill)]} if kill else None, **more)
    run.train(resume_from_checkpoint=resume or None)
    return found_by(run)


def refused(checkpoint: str, policy: Any) -> list[str]:
    """What each of these is told on this rank."""
    as_launched()
    out = str(Path(checkpoint).parent)
    calls: list[Callable[[], Any]] = [
        lambda: trainer(out, policy, optim="sgd").train(),
        lambda: trainer(out, policy).train(resume_from_checkpoint=checkpoint),
        lambda: trainer(out, policy, {"model": funicular.offload(llama(), policy, group="single")}),
    ]
    return [*map(told_by, calls), *fails_to_save(out, policy)]


def told_by(call: Callable[[], Any]) -> str:
    """What a call is refused with."""
    try:
        call()
    except funicular.UsageError as error:
        return str(error)
    return "nothing"


def fails_to_save(out: str, policy: Any) -> list[str]:
    """A file of a checkpoint that a rank cannot write, first on rank 0, then on rank 1; what all are told, and that they go on together."""
    as_launched()
    run = trainer(out, policy, max_steps=2, save_strategy="no")
    run.train()
    said = []
    for rank, target in enumerate((type(run.lr_scheduler), torch)):
        name = ("state_dict", "save")[rank]
        kept = getattr(target, name)
        if run.args.process_index == rank:
            setattr(target, name, None)
        try:
            run._save_checkpoint(run.model, None)
        except (TypeError, funicular.RuntimeFailure) as error:
            said.append(f"{type(error).__name__}: {error}")
        setattr(target, name, kept)
        said.append(str(Path(out, "checkpoint-2", "trainer_state.json").exists()))
    return [*said, f"{run.evaluate()['eval_loss']:.3f}"]


if __name__ == "__main__":
    # Started by a launcher.
    out, policy, kill = sys.argv[1:]
    torch.set_num_threads(1)
    run = trainer(out, json.loads(policy), {"callbacks": [Dies(int(kill))]})
    run.train(resume_from_checkpoint=True if not int(kill) else None)
    torch.save(found_by(run), Path(out) / f"{run.args.process_index}.found")
    dist.barrier()
    dist.destroy_process_group()
