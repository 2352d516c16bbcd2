"""Makers of example tensors that several models of the zoo share.

Sequence lengths and feature sizes differ from every usual batch size, so that a tensor's dim 0 is
the batch size only where it is meant to be.
"""

from __future__ import annotations

import torch

VOCAB = 96
SEQ_LEN = 12
IGNORE = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out."""


def integers(g: torch.Generator, *shape: int, low: int = 0, high: int = VOCAB) -> torch.Tensor:
    """Integers in [low, high)."""
    return torch.randint(low, high, shape, generator=g)


def floats(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, generator=g, dtype=torch.float64)


def lengths(g: torch.Generator, batch: int, longest: int) -> torch.Tensor:
    """Lengths in [longest // 4, longest], descending from `longest`, so that parts are uneven."""
    drawn = torch.randint(max(1, longest // 4), longest + 1, (batch,), generator=g)
    drawn[0] = longest
    drawn[-1] = longest if batch == 1 else longest // 4
    return drawn.sort(descending=True).values


def padding_mask(lens: torch.Tensor, longest: int) -> torch.Tensor:
    """[batch, longest] bool: True where a token is real."""
    return torch.arange(longest) < lens[:, None]


def language(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the next token of each: two [batch, SEQ_LEN] tensors."""
    ids = integers(g, batch, SEQ_LEN + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def masked_language(
    g: torch.Generator, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, padding mask, and labels that are IGNORE but for about a third of the real tokens.

    Every sample has at least one label (its first token), and the counts differ.
    """
    mask = padding_mask(lengths(g, batch, SEQ_LEN), SEQ_LEN)
    tokens = integers(g, batch, SEQ_LEN, low=1).masked_fill(~mask, 0)
    chosen = torch.rand(batch, SEQ_LEN, generator=g) < 1 / 3
    chosen[:, 0] = True
    labels = integers(g, batch, SEQ_LEN).masked_fill(~(chosen & mask), IGNORE)
    return tokens, mask, labels


def images(g: torch.Generator, batch: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB images [batch, 3, size, size] and one of ten classes for each."""
    return floats(g, batch, 3, size, size), integers(g, batch, high=10)
