"""A small GPT, written as anyone would write it: nothing here knows of raypar."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past.

    Args:
        width: Size of the residual stream; divisible by `heads`.
        heads: Number of attention heads.
        dropout: Probability of dropping an attention weight or an output element.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, time, width) to the same shape."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, time, width)
        return F.dropout(self.out(y), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a four times wider MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, time, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only language model whose output layer shares the embedding's weight.

    `forward(tokens, targets)` takes two (batch, seq_len) int64 tensors and returns the mean
    cross-entropy in nats per token.

    Args:
        layers: Number of blocks.
        width: Size of the residual stream.
        heads: Attention heads of a block.
        seq_len: Longest sequence.
        vocab: Number of tokens; 256 for bytes.
        dropout: Dropout probability everywhere.
    """

    def __init__(
        self, layers: int, width: int, heads: int, seq_len: int, vocab: int, dropout: float
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.position_embedding = nn.Embedding(seq_len, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.apply(self._init)
        for block in self.blocks:
            # Every block adds two terms to the residual stream: keep its variance at start-up
            # independent of depth (Radford et al. 2019, "Language Models are Unsupervised
            # Multitask Learners", section 2.3).
            for name in ("attention.out.weight", "mlp.2.weight"):
                nn.init.normal_(block.get_parameter(name), std=0.02 / (2 * layers) ** 0.5)
        self.head.weight = self.token_embedding.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of predicting `targets` from `tokens`, in nats."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    seq_len: int = 128,
    vocab: int = 256,
    dropout: float = 0.0,
) -> GPT:
    """A byte-level GPT (see `GPT` for what the arguments mean)."""
    return GPT(layers, width, heads, seq_len, vocab, dropout)
