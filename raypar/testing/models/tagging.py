"""A tagger whose loss is a masked mean that its author wrote out."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import SEQ_LEN, VOCAB, integers, lengths, padding_mask
from raypar.testing.models._case import register

TAGS = 7


class Tagger(nn.Module):
    """Embedding, a 1-D convolution over time, and a tag per token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 24)
        self.conv = nn.Conv1d(24, 32, kernel_size=3, padding=1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, TAGS)

    def forward(self, tokens: torch.Tensor, tags: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) * mask.unsqueeze(-1)
        x = self.norm(F.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2)))
        logits = self.head(x)
        loss = F.cross_entropy(logits.reshape(-1, TAGS), tags.reshape(-1), reduction="none")
        flat = mask.reshape(-1)
        return (loss * flat).sum() / flat.sum().clamp(min=1)


def _batch(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    lens = lengths(g, batch, SEQ_LEN)
    lens[batch // 3 : batch // 3 + batch // 8] = 0  # a sample that counts for nothing
    mask = padding_mask(lens, SEQ_LEN).to(torch.float64)
    return integers(g, batch, SEQ_LEN), integers(g, batch, SEQ_LEN, high=TAGS), mask


@register(_batch, reduction="count")
def masked_mean() -> nn.Module:
    """``(loss * mask).sum() / mask.sum().clamp(min=1)`` over uneven padding, one sample empty."""
    return Tagger()
