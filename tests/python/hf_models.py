"""Small models of ``transformers`` with random weights."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from models import CUDA

transformers = pytest.importorskip("transformers")

WIDTH = 256 if CUDA else 32
VOCAB = 64


def gpt2(**more: Any) -> nn.Module:
    """The head is tied to the token embedding; dropout is on."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=32, n_embd=WIDTH, n_layer=5, n_head=4, bos_token_id=0, eos_token_id=1, **more
    )
    return transformers.GPT2LMHeadModel(config)


def llama(**more: Any) -> nn.Module:
    """Grouped queries, rotary buffers, tied embeddings."""
    more = {"tie_word_embeddings": True} | more
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=0, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def t5(**more: Any) -> nn.Module:
    """One embedding for encoder, decoder and head; ``position_bias`` is made in block 0 and passes through all."""
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=WIDTH // 4, d_ff=2 * WIDTH, num_layers=4, num_decoder_layers=4,
        num_heads=4, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **more,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


CAUSAL: dict[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "llama": llama}
MODELS: dict[str, Callable[..., nn.Module]] = {**CAUSAL, "t5": t5}
