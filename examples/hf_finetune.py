"""Train every parameter of a causal language model with Hugging Face's Trainer.

Without ``--model`` the weights are random, in the shape of a 7 B Llama, and the text is Python's standard library as bytes: nothing is downloaded.
``--model DIRECTORY_OR_NAME --text FILE`` trains a real one. ``--resume`` goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from funicular.integrations.transformers import offloaded


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, one after the other."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.rows = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index].long()
        return {"input_ids": row, "labels": row}


def bytes_of_python(size: int) -> torch.Tensor:
    """The first bytes of the standard library's sources."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a name on the hub; random weights without it")
    parser.add_argument("--text", type=Path, help="a file to train on, with --model")
    parser.add_argument("--policy", default="host", help="a file, a preset's name, or a DeepSpeed configuration")
    parser.add_argument("--out", default="runs")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--rows", type=int, default=4, help="sequences in one forward")
    parser.add_argument("--passes", type=int, default=4, help="forwards and backwards before each step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--hidden", type=int, default=4096, help="of the random model, as the next two")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--heads", type=int, default=32)
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """Return the model and its text as tokens."""
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        text = (
            options.text.read_text()
            if options.text
            else bytes_of_python(4 << 20).numpy().tobytes().decode(errors="replace")
        )
        return AutoModelForCausalLM.from_pretrained(options.model, torch_dtype=torch.bfloat16), torch.tensor(
            tokenizer(text)["input_ids"]
        )
    config = LlamaConfig(
        vocab_size=256, hidden_size=options.hidden, intermediate_size=options.hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, max_position_embeddings=options.length, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config), bytes_of_python(16 << 20)
    finally:
        torch.set_default_dtype(before)


def main() -> Any:
    """Train."""
    options = parse()
    model, tokens = build(options)
    args = TrainingArguments(
        options.out, max_steps=options.steps, per_device_train_batch_size=options.rows, gradient_accumulation_steps=options.passes,
        learning_rate=1e-5, warmup_steps=10, lr_scheduler_type="cosine", max_grad_norm=1.0, logging_steps=1, save_steps=options.save_every,
        save_total_limit=2, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = offloaded(Trainer)(model, args, train_dataset=Rows(tokens, options.length), policy=options.policy)
    trainer.train(resume_from_checkpoint=True if options.resume else None)
    trainer.save_model(str(Path(options.out) / "model"))
    return trainer


if __name__ == "__main__":
    trainer = main()
