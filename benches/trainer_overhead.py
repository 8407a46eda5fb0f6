"""Seconds per step of Hugging Face's Trainer over an offloaded model, beside a loop by hand over the same one.

``python benches/trainer_overhead.py`` takes a Llama of 2.8 B parameters and 16,384 tokens a step, on a GPU; options make it smaller. Both train the
same steps with the same policy, one after the other; the first two steps of each are left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import funicular
from funicular.integrations.transformers import offloaded


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note()

    def note(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """The median step, without the first two."""
        return statistics.median(b - a for a, b in zip(self.ends[1:], self.ends[2:]))


class Rows(torch.utils.data.Dataset):
    """Random tokens."""

    def __init__(self, rows: int, length: int) -> None:
        self.tokens = torch.randint(0, 32000, (rows, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def build(options: argparse.Namespace) -> Any:
    """Return the model, in bf16, with its blocks checkpointed."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 128, max_position_embeddings=options.length, use_cache=False,
    )  # fmt: skip
    # Random numbers for 2.8 B parameters take a processor minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model


def by_hand(options: argparse.Namespace) -> float:
    """Return the seconds of a step of a loop by hand."""
    clock = Clock()
    model = build(options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    funicular.offload(model, options.policy).train()
    opt = funicular.AdamW(model.parameters(), lr=1e-5)
    data = torch.utils.data.DataLoader(
        Rows(options.rows * (options.steps + 3), options.length), batch_size=options.rows
    )
    for _, batch in zip(range(options.steps + 3), data):
        loss = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        clock.note()
    return clock.seconds()


def by_trainer(options: argparse.Namespace) -> float:
    """Return the seconds of a step of the Trainer."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, max_steps=options.steps + 3, per_device_train_batch_size=options.rows, learning_rate=1e-5, max_grad_norm=1.0,
            lr_scheduler_type="constant", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
            save_strategy="no", logging_steps=1000, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        data = Rows(options.rows * (options.steps + 3), options.length)
        offloaded(Trainer)(build(options), args, train_dataset=data, policy=options.policy, callbacks=[clock]).train()
    return clock.seconds()


def main() -> None:
    """Measure both, three times in turn, and print JSON: the ratio is that of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="host")
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"by hand": [], "trainer": []}
    for _ in range(3):
        for name, measure in (("by hand", by_hand), ("trainer", by_trainer)):
            found[name].append(measure(options))
            gc.collect()
    ratio = statistics.median(found["trainer"]) / statistics.median(found["by hand"])
    print(json.dumps({"seconds": found, "ratio": ratio, "tokens": options.rows * options.length}))


if __name__ == "__main__":
    main()
