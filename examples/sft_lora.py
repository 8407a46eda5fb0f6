"""Fine-tune adapters (LoRA) over an offloaded base with TRL's SFTTrainer: the base costs 2 bytes a parameter, wherever it lives.

Without ``--model`` the base has random weights and a tokenizer of bytes: nothing is downloaded. Needs trl and peft.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from funicular.integrations.transformers import offloaded

TEXT = [
    "A funicular is a railway that climbs a slope by a rope.",
    "Two cars hang on one rope, and the one that goes down helps the other up.",
    "What is not needed now waits at the other end of the line.",
]


def tokenizer_of_bytes() -> Any:
    """A tokenizer that needs no file."""
    letters = Tokenizer(models.WordLevel({chr(code): code for code in range(2, 128)} | {"?": 0, "!": 1}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?", pad_token="?", eos_token="!")


def main() -> Any:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the hub; random weights without it")
    parser.add_argument("--policy", default="host", help="a file, a preset's name, or a DeepSpeed configuration")
    parser.add_argument("--out", default="adapters")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=2048, help="of the random model, as the next one")
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        config = LlamaConfig(
            vocab_size=128, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 16, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        model, tokenizer = LlamaForCausalLM(config).to(torch.bfloat16), tokenizer_of_bytes()
    args = SFTConfig(
        options.out, max_steps=options.steps, per_device_train_batch_size=2, learning_rate=2e-4, logging_steps=1, report_to=[],
        save_steps=options.steps, bf16=True, use_cpu=not torch.cuda.is_available(), gradient_checkpointing=False,
    )  # fmt: skip
    trainer = offloaded(SFTTrainer)(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"text": TEXT * 40}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        policy=options.policy,
    )
    trainer.train()
    trainer.save_model(options.out)
    return trainer


if __name__ == "__main__":
    trainer = main()
