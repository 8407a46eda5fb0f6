"""Runs of TRL's trainers: plain, offloaded, on several ranks, and as the reference of so many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

import trainer_runs
from trainer_ranks import ROWS, SIZE, as_launched, found_by, in_turn, on_rank, options, told_by
from trainer_runs import seen, trainer, weights

WORDS = [
    "a funicular climbs",
    "steep slopes rise",
    "two cars balance",
    "one rope holds",
    "rails go up",
    "the town is below",
]


def tokenizer() -> Any:
    """A tokenizer of letters."""
    letters = Tokenizer(models.WordLevel({chr(code): code for code in range(2, 128)} | {"?": 0, "!": 1}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", pad_token="?", eos_token="!")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def build(kind: str = "causal") -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=trainer_runs.WIDTH, intermediate_size=2 * trainer_runs.WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        num_labels=1,
    )  # fmt: skip
    if kind == "reward":
        return transformers.LlamaForSequenceClassification(config)
    return transformers.LlamaForCausalLM(config)


def lora(kind: str = "causal") -> Any:
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type=task)


def prompts(word: str) -> str:
    return word[:6]


TEXT = {"text": WORDS * 8}
PAIRS = {
    "prompt": [prompts(w) for w in WORDS] * 8,
    "chosen": [w[6:] for w in WORDS] * 8,
    "rejected": [w[:5:-1] for w in WORDS] * 8,
}
PROMPTS = {"prompt": PAIRS["prompt"]}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


#: trainer, its arguments, their values, the data, what the constructor takes besides
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "SFT": ("SFTTrainer", {"max_length": 32}, TEXT, {}),
    "DPO": ("DPOTrainer", {"max_length": 40, "precompute_ref_log_probs": True}, PAIRS, {}),
    "Reward": ("RewardTrainer", {"max_length": 40}, {k: PAIRS[k] for k in ("chosen", "rejected")}, {}),
    "GRPO": (
        "GRPOTrainer",
        {"max_completion_length": 6, "num_generations": 2, "beta": 0.0, "max_steps": 3},
        PROMPTS,
        {"reward_funcs": reward},
    ),
}


def made(kind: str, policy: Any, out: Path | str, adapters: bool, of: Any = None, rows: Any = None, **more: Any) -> Any:
    """A trainer of TRL. ``of`` makes its class of TRL's; ``rows`` are its data; of ``more`` ``call`` is what the constructor takes
    besides, and ``begun`` the folder of adapters that the model has from the beginning.
    """
    name, own, data, besides = KINDS[kind]
    model = build(kind.lower())
    begun = more.pop("begun", None)
    if begun is not None:
        model = peft.PeftModel.from_pretrained(model, begun, is_trainable=True)
    given = {"max_steps": 6, "eval_strategy": "no", "max_grad_norm": 0.5, "learning_rate": 1e-2} | own | more
    if name == "SFTTrainer" and not hasattr(trl.SFTConfig, "max_length"):  # its name in TRL before 0.16
        given["max_seq_length"] = given.pop("max_length")
    rows = datasets.Dataset.from_dict(data) if rows is None else rows
    call = {"train_dataset": rows, "eval_dataset": None, "processing_class": tokenizer()} | besides
    call |= given.pop("call", {})
    if adapters and begun is None:
        call["peft_config"] = lora(kind.lower())
    if hasattr(policy, "policy"):
        policy = policy.policy(model)
    base = getattr(trl, name)
    given["arguments"] = getattr(trl, name.replace("Trainer", "Config"))
    return trainer(out, policy, model=model, base=base if of is None else of(base), call=call, **given)


def run(*args: Any, resume: Any = None, **more: Any) -> Any:
    """A trainer that has trained."""
    found = made(*args, **more)
    found.train(resume)
    return found


def of_ranks(kind: str, size: int) -> dict[str, Any]:
    """Options of a rank, or of the one process that has the batches of ``size`` ranks."""
    return options(size) | ({"precompute_ref_batch_size": ROWS} if kind == "DPO" else {})


def reference(kind: str, out: Path, adapters: bool, **more: Any) -> Any:
    """One process that runs the batches of all ranks in turn."""
    return run(kind, None, out, adapters, of=in_turn, **of_ranks(kind, SIZE) | more)


def train(kind: str, out: str, policy: Any, adapters: bool, data: str, more: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank; without a policy the plain trainer, with DistributedDataParallel."""
    as_launched()
    rows = datasets.load_from_disk(data)
    found = run(kind, policy, out, adapters, of=on_rank, rows=rows, **of_ranks(kind, 1) | more)
    if policy is None:
        return {"losses": torch.stack(found.losses), "said": seen(found), "weights": weights(found.model)}
    return found_by(found) | {"frozen": sum(not p.requires_grad for p in found.model.parameters())}


def refused_then_begun(out: str, policy: Any, data: str) -> tuple[str, dict[str, Any]]:
    """What a rank is told that resumes adapters; then it trains from them, as a model that has them when it is offloaded."""
    as_launched()
    checkpoint = f"{out}/checkpoint-3"
    rows = datasets.load_from_disk(data)
    said = told_by(
        lambda: run("SFT", policy, out, True, of=on_rank, rows=rows, resume=checkpoint, **of_ranks("SFT", 1))
    )
    return said, train("SFT", f"{out}-begun", policy, True, data, {"begun": checkpoint})
