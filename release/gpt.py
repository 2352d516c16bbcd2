"""The GPT that the speed comparisons train, with a way to cut it into pipeline pieces by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer block: causal attention, then a GELU feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = (
            y.view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for y in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        return x + self.out(F.gelu(self.fc(self.norm2(x))))


class Embedding(nn.Module):
    """Tokens plus learned positions."""

    def __init__(self, seq_len: int, vocab: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seq_len, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]


class Head(nn.Module):
    """Final norm and output layer."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x))


class Piece(nn.Sequential):
    """Some consecutive layers of a GPT, as one pipeline stage holds them."""

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """The embedding's or the output layer's weight, if one of them is in this piece."""
        for layer in self:
            if isinstance(layer, Embedding):
                return layer.tokens.weight
            if isinstance(layer, Head):
                return layer.out.weight
        return None


class GPT(nn.Module):
    """A decoder whose output layer is its token embedding."""

    def __init__(self, layers: int, width: int, heads: int, seq_len: int, vocab: int) -> None:
        super().__init__()
        self.embedding = Embedding(seq_len, vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = Head(vocab, width)
        self.head.out.weight = self.embedding.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())

    def untie(self) -> None:
        """Gives the output layer its own copy of the embedding."""
        self.head.out.weight = nn.Parameter(self.embedding.tokens.weight.detach().clone())

    def piece(self, index: int, count: int) -> Piece:
        """Piece `index` of `count`: equal numbers of blocks, the embedding first, the head last.

        Raises:
            ValueError: The blocks do not divide into `count` equal parts.
        """
        each, rest = divmod(len(self.blocks), count)
        if rest:
            raise ValueError(f"{len(self.blocks)} blocks do not make {count} equal pieces")
        layers: list[nn.Module] = list(self.blocks[index * each : (index + 1) * each])
        if index == 0:
            layers.insert(0, self.embedding)
        if index == count - 1:
            layers.append(self.head)
        return Piece(*layers)


def gpt(
    layers: int = 4, width: int = 256, heads: int = 4, seq_len: int = 128, vocab: int = 256
) -> GPT:
    """Builds the model with fresh parameters."""
    return GPT(layers, width, heads, seq_len, vocab)
