"""The example GPT cut into pipeline pieces by hand, as torch.distributed.pipelining wants them."""

from __future__ import annotations

import torch
from torch import nn

from examples.models import GPT


class Piece(nn.Module):
    """Some consecutive blocks of a GPT; the first piece embeds, the last makes the logits.

    Attributes:
        tied_weight: The embedding's or the output layer's weight, where this piece has it.
    """

    def __init__(self, model: GPT, index: int, count: int) -> None:
        super().__init__()
        each, rest = divmod(len(model.blocks), count)
        if rest:
            raise ValueError(f"{len(model.blocks)} blocks do not make {count} equal pieces")
        self.blocks = nn.Sequential(*model.blocks[index * each : (index + 1) * each])
        self.first, self.last = index == 0, index == count - 1
        if self.first:
            self.token_embedding = model.token_embedding
            self.position_embedding = model.position_embedding
        if self.last:
            self.norm, self.head = model.norm, model.head

    @property
    def tied_weight(self) -> nn.Parameter | None:
        if self.first:
            return self.token_embedding.get_parameter("weight")
        return self.head.get_parameter("weight") if self.last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.first:
            positions = torch.arange(x.shape[1], device=x.device)
            x = self.token_embedding(x) + self.position_embedding(positions)
        x = self.blocks(x)
        return self.head(self.norm(x)) if self.last else x


def cut(model: GPT, held: list[int], count: int) -> dict[int, Piece]:
    """The pieces `held` of `count`; the output layer gets its own copy of the embedding.

    Raises:
        ValueError: The blocks do not divide into `count` equal parts.
    """
    model.head.weight = nn.Parameter(model.token_embedding.weight.detach().clone())
    return {index: Piece(model, index, count) for index in sorted(held)}
