"""A small decoder-only transformer in plain PyTorch: RMSNorm, RoPE, SwiGLU, causal attention.

It knows nothing of funicular. The demo, the tests and the benches train it; ``Config`` switches the spellings that
matter to a system that pages weights: tied weights, activation checkpointing, and matrix products written as
``h @ w.t()`` (autograd then saves a view of the weight) in place of ``F.linear``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Shape of a model and how it is written; the defaults give 41 M parameters."""

    vocab: int = 256
    dim: int = 512
    layers: int = 12
    heads: int = 8
    hidden: int = 1536
    tie: bool = False
    checkpoint: Literal["none", "reentrant", "saved_tensors"] = "none"
    matmul: Literal["linear", "matmul_t"] = "linear"


class Linear(nn.Linear):
    """A linear layer without bias that computes ``x @ w.t()`` in one of two spellings."""

    def __init__(self, inputs: int, outputs: int, matmul: str) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        if self.matmul == "matmul_t":
            return x @ self.weight.t()
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the last dimension, computed in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x.float() * scale).type_as(x) * self.weight


def rotate(x: Tensor) -> Tensor:
    """Apply rotary position embedding to ``x`` of shape (batch, heads, seq, head_dim)."""
    seq, dim = x.shape[-2:]
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim)
    angle = torch.arange(seq, device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, hidden, matmul = config.dim, config.hidden, config.matmul
        self.heads = config.heads
        self.norm1 = RMSNorm(dim)
        self.qkv = Linear(dim, 3 * dim, matmul)
        self.out = Linear(dim, dim, matmul)
        self.norm2 = RMSNorm(dim)
        self.gate = Linear(dim, hidden, matmul)
        self.up = Linear(dim, hidden, matmul)
        self.down = Linear(hidden, dim, matmul)

    def attend(self, x: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, seq, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """``model(tokens)`` gives logits, ``model(tokens, targets)`` the mean cross entropy in nats per token."""

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config = config or Config()
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = Linear(config.dim, config.vocab, config.matmul)
        self.apply(self._init)
        for block in self.blocks:
            for layer in (block.out, block.down):
                nn.init.normal_(layer.weight, std=0.02 / (2 * config.layers) ** 0.5)
        if config.tie:
            self.head.weight = self.embed.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.config.checkpoint == "none" or not self.training:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.config.checkpoint == "reentrant")
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
