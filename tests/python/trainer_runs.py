"""Runs of Hugging Face's Trainer, plain and offloaded, in this process or, to be killed, in one of its own."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from funicular.reference import ReferenceAdamW
from models import CUDA

WIDTH = 256 if CUDA else 32
VOCAB = 64
LR = 1e-2


def llama(**more: Any) -> nn.Module:
    """A Llama with dropout, whose head is the embedding."""
    torch.manual_seed(1)
    options = {"tie_word_embeddings": True, "attention_dropout": 0.1} | more
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of tokens, the same for the same index."""

    def __init__(self, rows: int = 48, length: int = 9) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(2, VOCAB, (self.length,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def arguments(out: Path | str, kind: type | None = None, **more: Any) -> Any:
    """Twelve steps of two accumulated batches, clipped, on a schedule, with evaluation in between."""
    options: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 12,
        "learning_rate": LR, "weight_decay": 0.1, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_steps": 3,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 3, "report_to": [], "disable_tqdm": True,
        "seed": 3, "use_cpu": not CUDA,
    }  # fmt: skip
    return (kind or transformers.TrainingArguments)(**(options | more))


def plain(base: type) -> type:
    """A trainer with the optimizer of the same bits."""

    class Plain(base):  # type: ignore[valid-type, misc]
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
            return ReferenceAdamW, {"lr": args.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8}

    return Plain


def trainer(
    out: Path | str,
    policy: Any,
    model: nn.Module | None = None,
    base: type | None = None,
    call: Any = None,
    **more: Any,
) -> Any:
    """A trainer: offloaded by a policy, or with ``policy=None`` plain, with the optimizer of the same bits.

    ``more`` are training arguments; ``call`` what the constructor takes besides.
    """
    base = base or transformers.Trainer
    call = {"train_dataset": Tokens(), "eval_dataset": Tokens(8)} | (call or {})
    if "model_init" not in call:
        call["model"] = llama() if model is None else model
    kind = more.pop("arguments", None)
    args = arguments(out, kind, **more)
    if policy is None:
        return plain(base)(args=args, **call)
    from funicular.integrations.transformers import offloaded

    return offloaded(base)(args=args, policy=policy, **call)


def seen(trainer: Any) -> list[dict[str, float]]:
    """What was logged, without times."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        {k: line[k] for k in keys if k in line}
        for line in trainer.state.log_history
        if "loss" in line or "eval_loss" in line
    ]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def equal(a: Any, b: Any) -> bool:
    """Whether two trainers logged the same and have the same weights, bit for bit."""
    one, other = weights(a.model), weights(b.model)
    return seen(a) == seen(b) and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class KillAt(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends the process at a step, as a signal would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os._exit(9)


if __name__ == "__main__":
    out, policy, step = sys.argv[1:]
    torch.set_num_threads(1)
    trainer(out, json.loads(policy), call={"callbacks": [KillAt(int(step))]}).train()
