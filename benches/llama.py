"""A Llama-like decoder in plain PyTorch for benchmarks: RMSNorm, RoPE, SwiGLU, causal attention, chunked cross entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    dim: int
    layers: int
    hidden: int
    vocab: int = 32000
    head: int = 128

    @property
    def matrix_parameters(self) -> int:
        """Parameters of matrix products: what 6 FLOPs per token and parameter are counted for."""
        return self.layers * (4 * self.dim**2 + 3 * self.dim * self.hidden) + self.vocab * self.dim

    @property
    def parameters(self) -> int:
        """All of them: two tables, norms too."""
        return self.matrix_parameters + self.vocab * self.dim + (2 * self.layers + 1) * self.dim

    def flops(self, tokens: int, seq: int) -> float:
        """FLOPs of a step: 6 per matrix parameter and token, and causal attention; recomputation is not counted."""
        return tokens * (6.0 * self.matrix_parameters + 6.0 * self.layers * self.dim * seq)


#: by billions of parameters
SHAPES = {
    "toy": Shape(128, 4, 352, vocab=512, head=64),
    "0.1": Shape(768, 12, 2048),
    "0.4": Shape(1280, 16, 3456),
    "1.35": Shape(2048, 24, 5504),
    "3.14": Shape(3072, 26, 8192),
    "6.7": Shape(4096, 32, 11008),
    "11": Shape(5120, 34, 13824),
}


class RMSNorm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to (batch, heads, seq, head)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim = shape.dim
        self.head = shape.head
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(dim, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, dim = x.shape
        h = self.norm1(x)
        q, k, v = (w(h).view(batch, seq, -1, self.head).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, seq, dim))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """``model(ids)`` with ids (batch, seq + 1) gives the mean loss in nats per token."""

    def __init__(self, shape: Shape, *, ce_chunk: int = 4096, recompute: bool = True) -> None:
        super().__init__()
        self.shape, self.ce_chunk, self.recompute = shape, ce_chunk, recompute
        self.embed = nn.Embedding(shape.vocab, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.dim)
        self.head = nn.Linear(shape.dim, shape.vocab, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def rope(self, seq: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, the same for every row: (1, seq, head)."""
        head = self.shape.head
        frequency = 10_000.0 ** (-torch.arange(0, head, 2, device=x.device, dtype=torch.float32) / head)
        angle = torch.arange(seq, device=x.device, dtype=torch.float32)[:, None] * frequency
        angle = torch.cat((angle, angle), -1)[None]
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def chunk_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Summed loss of some positions."""
        return F.cross_entropy(self.head(h).float(), targets, reduction="sum")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids[:, :-1])
        rope = self.rope(x.shape[1], x)
        for layer in self.layers:
            x = checkpoint(layer, x, *rope, use_reentrant=False) if self.recompute else layer(x, *rope)
        h, targets = self.norm(x).flatten(0, 1), ids[:, 1:].flatten()
        parts = zip(h.split(self.ce_chunk), targets.split(self.ce_chunk), strict=True)
        losses = [checkpoint(self.chunk_loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum() / targets.numel()


def build(name: str, device: str) -> Llama:
    """The same bf16 weights every time they are made on a device; norms are bf16 too."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return Llama(SHAPES[name])
        finally:
            torch.set_default_dtype(torch.float32)
