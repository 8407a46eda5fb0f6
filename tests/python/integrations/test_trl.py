"""TRL's trainers over an offloaded model, with adapters of PEFT and without: the bits of the plain trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import funicular
from twin import World

trl = pytest.importorskip("trl", reason="make test-integrations has it")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers

import trainer_runs
from trainer_runs import equal, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

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


def run(kind: str, policy: Any, out: Path, adapters: bool, steps: int = 6, resume: Any = None, **more: Any) -> Any:
    name, options, data, call = KINDS[kind]
    model = build(kind.lower())
    options = {"max_steps": steps, "eval_strategy": "no", "max_grad_norm": 0.5, "learning_rate": 1e-2} | options | more
    if name == "SFTTrainer" and not hasattr(trl.SFTConfig, "max_length"):  # its name in TRL before 0.16
        options["max_seq_length"] = options.pop("max_length")
    rows = datasets.Dataset.from_dict(data)
    call = {"train_dataset": rows, "eval_dataset": None, "processing_class": tokenizer()} | call
    if adapters:
        call["peft_config"] = lora(kind.lower())
    if policy is not None:
        policy = policy.policy(model)
    made = trainer(
        out,
        policy,
        model=model,
        base=getattr(trl, name),
        call=call,
        arguments=getattr(trl, name.replace("Trainer", "Config")),
        **options,
    )
    made.train(resume)
    return made


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_like_the_plain_trainer(kind: str, adapters: bool, two_worlds: World, tmp_path: Path):
    if kind == "DPO" and not adapters:
        pytest.skip("test_dpo_against_a_second_model")
    plain = run(kind, None, tmp_path / "plain", adapters)
    paged = run(kind, two_worlds, tmp_path / "paged", adapters)
    assert equal(plain, paged)
    assert isinstance(paged._adamw(), funicular.AdamW)
    if adapters:
        # A frozen base has neither gradients nor states: its own bytes, and those of the adapters, once each.
        size = sum(p.nbytes for p in paged.model.parameters())
        tier = "host" if two_worlds.params == "host" else "nvme"
        assert funicular.stats(paged.model).budgets[tier].used < 4 * size


@pytest.mark.parametrize("second", ["precomputed", "resident", "offloaded"])
def test_dpo_against_a_second_model(second: str, host_world: World, tmp_path: Path):
    """Its answers are computed beforehand; or it stays beside the model; or it is offloaded too, by the same policy."""
    found = []
    for name, world in (("plain", None), ("paged", host_world)):
        more: dict[str, Any] = {"precompute_ref_log_probs": second == "precomputed"}
        reference = build()
        if second == "offloaded" and world is not None:
            reference.requires_grad_(False)
            funicular.offload(reference, world.policy(reference))
        KINDS["DPO"][3].clear()
        KINDS["DPO"][3]["ref_model"] = reference
        try:
            found.append(run("DPO", world, tmp_path / name, False, **more))
        finally:
            KINDS["DPO"][3].clear()
    assert equal(*found)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_resumed(adapters: bool, two_worlds: World, tmp_path: Path):
    plain = run("SFT", None, tmp_path / "plain", adapters)
    first = run("SFT", two_worlds, tmp_path / "paged", adapters, steps=6)
    assert equal(plain, first)
    funicular.unwrap(first.model)
    again = run("SFT", two_worlds, tmp_path / "paged", adapters, resume=str(tmp_path / "paged" / "checkpoint-3"))
    assert equal(plain, again)
    names = {path.name for path in (tmp_path / "paged" / "checkpoint-3").iterdir()}
    # Adapters are saved alone, as PEFT saves them.
    assert ("adapter_model.safetensors" in names) == adapters
    assert ("model.safetensors" in names) != adapters
