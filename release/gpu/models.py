"""Models of the GPU measurements: GPT-2 of 350 million parameters, a Llama of 1.3 billion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        kind: ``gpt`` (learned places, layer norm, GELU, tied head) or ``llama`` (rotary, RMS norm,
            SwiGLU, a head of its own).
        layers: Blocks.
        width: Features per token.
        heads: Attention heads.
        hidden: Features inside a feed-forward layer.
        vocab: Tokens known.
        length: Tokens per sample.
        batch: Samples per step.
    """

    kind: str
    layers: int
    width: int
    heads: int
    hidden: int
    vocab: int
    length: int
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch * self.length

    def flops(self, parameters: int) -> float:
        """Floating-point operations of a step: 6 per parameter and token, and causal attention."""
        attention = 6.0 * self.layers * self.width * self.length  # half of the square is masked
        return self.tokens * (6.0 * parameters + attention)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, on the host."""
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab, (self.batch, self.length + 1), generator=g)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def model(self) -> nn.Module:
        """The model in bfloat16."""
        return Decoder(self).to(torch.bfloat16)


SHAPES = {
    "gpt2-350m-1024": Shape("gpt", 24, 1024, 16, 4096, 50304, 1024, 16),
    "gpt2-350m-2048": Shape("gpt", 24, 1024, 16, 4096, 50304, 2048, 8),
    "llama-1.3b-1024": Shape("llama", 24, 2048, 16, 5504, 32000, 1024, 8),
    "llama-1.3b-2048": Shape("llama", 24, 2048, 16, 5504, 32000, 2048, 4),
}
SMOKE = {
    "gpt-smoke": Shape("gpt", 2, 32, 2, 64, 61, 16, 4),
    "llama-smoke": Shape("llama", 2, 32, 2, 64, 61, 16, 4),
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-6)


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads = shape.width, shape.heads
        self.gated = shape.kind == "llama"
        norm = RMSNorm if self.gated else nn.LayerNorm
        self.norm1, self.norm2 = norm(width), norm(width)
        bias = not self.gated
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)
        self.up = nn.Linear(width, shape.hidden, bias=bias)
        self.down = nn.Linear(shape.hidden, width, bias=bias)
        self.gate = nn.Linear(width, shape.hidden, bias=False) if self.gated else None

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        heads = (b, t, self.heads, width // self.heads)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(width, -1))
        if self.gate is not None:
            q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        y = self.norm2(x)
        if self.gate is not None:
            return x + self.down(F.silu(self.gate(y)) * self.up(y))
        return x + self.down(F.gelu(self.up(y), approximate="tanh"))


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Decoder(nn.Module):
    """A decoder-only language model; the loss is the mean cross-entropy of the next tokens."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.vocab = shape.vocab
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        gpt = shape.kind == "gpt"
        self.places = nn.Embedding(shape.length, shape.width) if gpt else None
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width) if gpt else RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.length), 10000.0 ** (-torch.arange(half) / half))
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if gpt:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.head(self.norm(x)).view(-1, self.vocab)
        return F.cross_entropy(logits.float(), targets.view(-1))
