"""Models of medium size for `release/cost.py`: sizes that the calibration has not seen."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with one projection each, and an additive bias if given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(
        self, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        """[B, T, W], [B, S, W], [heads, T, S] → [B, T, W]."""

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        if bias is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) + bias, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block, with cross-attention where asked for."""

    def __init__(self, width: int, heads: int, cross: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads) if cross else None
        self.norm3 = nn.LayerNorm(width) if cross else None
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, W] → [B, T, W]."""
        h = self.norm1(x)
        x = x + self.attention(h, h, bias, self.causal)
        if self.cross is not None and self.norm3 is not None and memory is not None:
            x = x + self.cross(self.norm3(x), memory, None, False)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder-only language model."""

    def __init__(self, layers: int, width: int, heads: int, vocab: int, length: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the next tokens."""
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, self.vocab), targets.view(-1))


class T5(nn.Module):
    """An encoder and a decoder with learned position biases."""

    def __init__(self, layers: int, width: int, heads: int, vocab: int, length: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokens = nn.Embedding(vocab, width)
        self.bias = nn.Parameter(torch.zeros(heads, length, length))
        self.encoder = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(width, heads, cross=True) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, source: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the targets given the source."""
        memory = self.tokens(source)
        for block in self.encoder:
            memory = block(memory, bias=self.bias)
        x = self.tokens(F.pad(targets[:, :-1], (1, 0)))
        for block in self.decoder:
            x = block(x, memory)
        return F.cross_entropy(self.head(self.norm(x)).view(-1, self.vocab), targets.view(-1))


class CNN(nn.Module):
    """Residual convolutions with batch norm."""

    def __init__(self, width: int, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        for i in range(3):
            n = width << i
            self.stages.append(
                nn.ModuleList(
                    nn.Sequential(
                        nn.Conv2d(n, n, 3, padding=1, bias=False),
                        nn.BatchNorm2d(n),
                        nn.ReLU(),
                        nn.Conv2d(n, n, 3, padding=1, bias=False),
                        nn.BatchNorm2d(n),
                    )
                    for _ in range(blocks)
                )
            )
        self.downs = nn.ModuleList(
            nn.Conv2d(width << i, width << (i + 1), 2, stride=2) for i in range(2)
        )
        self.head = nn.Linear(width << 2, classes)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the classes."""
        x = F.relu(self.norm(self.stem(image)))
        for i, stage in enumerate(self.stages):
            for block in stage:  # type: ignore[attr-defined]
                x = F.relu(x + block(x))
            if i < 2:
                x = self.downs[i](x)
        return F.cross_entropy(self.head(x.mean((2, 3))), label)


class MLP(nn.Module):
    """Linear layers with ReLU."""

    def __init__(self, width: int, layers: int, classes: int = 100) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the classes."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return F.cross_entropy(self.head(x), label)
