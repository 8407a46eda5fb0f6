"""Small models whose blocks are written in the ways that matter to a system that pages weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

#: A CUDA frame is at least 2 MiB: a block has to be as large as that to be paged alone.
CUDA = os.environ.get("FUNICULAR_TEST_DEVICE", "host") == "cuda"
WIDTH = 512 if CUDA else 32
VOCAB = 31


class Linear(nn.Module):
    """``F.linear``, or ``h @ w.t()`` whose backward needs a saved view of the weight."""

    def __init__(self, inputs: int, outputs: int, matmul: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.matmul = matmul
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs) / 8) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.matmul:
            return F.linear(x, self.weight, self.bias)
        y = x @ self.weight.t()
        return y if self.bias is None else y + self.bias


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int = WIDTH, matmul: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, width, matmul, bias=True)
        self.down = Linear(width, width, matmul)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """``depth`` blocks between two linear maps; ``call`` says how a block is called."""

    def __init__(
        self,
        block: Callable[[], nn.Module] = Block,
        depth: int = 4,
        call: Callable[[nn.Module, Any], Any] = lambda block, x: block(x),
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.width, self.call = width, call
        self.inp = nn.Linear(width, width)
        self.layers = nn.ModuleList(block() for _ in range(depth))
        self.out = nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        x = self.inp(x)
        for layer in self.layers:
            x = self.call(layer, x)
        return self.out(x)


def stack(block: Callable[[], nn.Module] = Block, depth: int = 4, **more: Any) -> Callable[[], Stack]:
    """A builder, as the cases take it."""
    return lambda: Stack(block, depth, **more)


class RMSNorm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype) * self.weight


class DecoderBlock(nn.Module):
    """Causal attention and a gated MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, matmul: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = Linear(width, 3 * width, matmul)
        self.proj = Linear(width, width, matmul)
        self.gate = Linear(width, 2 * width, matmul)
        self.up = Linear(width, 2 * width, matmul)
        self.down = Linear(2 * width, width, matmul)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(w // self.heads)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(mask, float("-inf")).softmax(-1) @ v
        x = x + F.dropout(self.proj(mixed.transpose(1, 2).reshape(b, t, w)), self.dropout, self.training)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A decoder-only transformer over tokens; ``forward`` gives the loss of predicting the next token."""

    def __init__(
        self,
        matmul: bool = False,
        ckpt: str = "none",
        depth: int = 4,
        tie: bool = False,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.ckpt, self.width = ckpt, WIDTH
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(DecoderBlock(WIDTH, 4, matmul, dropout) for _ in range(depth))
        self.norm = RMSNorm(WIDTH)
        self.head = Linear(WIDTH, VOCAB, matmul)
        if tie:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def example(self, run: Any) -> Tensor:
        return run.tokens(2, 9)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x) if self.ckpt == "none" else checkpoint(layer, x, use_reentrant=self.ckpt == "reentrant")
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.logits(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).sqrt()
