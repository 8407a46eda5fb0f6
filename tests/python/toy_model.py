"""A toy model in the place of a large one, for scripts that the documents show.

``python tests/python/toy_model.py`` writes into the current directory what docs/quickstart.md asks its reader for: the model, a text, the policy
and the script, the last two as the page shows them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

PAGE = Path(__file__).parents[2] / "docs" / "quickstart.md"
NAME = "Qwen2.5-7B"
TEXT = "A funicular climbs steep slopes. " * 40
#: options of the page's script for so little text
SIZES = ["--rows", "2", "--passes", "2", "--length", "32", "--save-every", "2"]


def write_model(folder: Path) -> None:
    """Write a model of four blocks with a tokenizer of letters."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / NAME)
    letters = Tokenizer(models.WordLevel({chr(code): code for code in range(1, 256)} | {"?": 0}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(folder / NAME)


def block(language: str) -> str:
    """Return the page's one block of a language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


if __name__ == "__main__":
    here = Path()
    write_model(here)
    (here / "text.txt").write_text(TEXT)
    (here / "policy.toml").write_text(block("toml"))
    (here / "finetune.py").write_text(block("python"))
