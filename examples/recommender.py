"""A click predictor over large embedding tables, after DLRM (Naumov et al. 2019, arXiv 1906.00091).

raypar train examples/recommender.yaml
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DENSE = 13
"""Numbers that every sample has beside its categories, as in the Criteo logs."""


class Recommender(nn.Module):
    """Embedding bags and a bottom MLP, dot products of each pair, a top MLP.

    `forward(dense, categories, clicked)` takes float (batch, 13), int64 (batch, tables, bag) and
    float (batch,) tensors and returns the mean cross-entropy of the clicks, in nats.

    Args:
        tables: Rows of every embedding table.
        width: Size of an embedding.
    """

    pairs: Tensor

    def __init__(self, tables: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in tables)
        self.bottom = nn.Sequential(nn.Linear(DENSE, 64), nn.ReLU(), nn.Linear(64, width))
        vectors = len(tables) + 1
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, offset=-1))
        features = width + vectors * (vectors - 1) // 2
        self.top = nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, categories: Tensor, clicked: Tensor) -> Tensor:
        """Returns the mean loss of predicting `clicked`, in nats."""
        x = self.bottom(dense)
        vectors = [x, *(table(categories[:, i]) for i, table in enumerate(self.tables))]
        stacked = torch.stack(vectors, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        features = torch.cat((x, products[:, self.pairs[0], self.pairs[1]]), dim=1)
        return F.binary_cross_entropy_with_logits(self.top(features).squeeze(-1), clicked)


def recommender(tables: Sequence[int] = (20_000, 5_000, 1_000), width: int = 32) -> Recommender:
    """A recommender (see `Recommender` for what the arguments mean)."""
    return Recommender(tables, width)


def clicks(
    global_batch: int,
    tables: Sequence[int] = (20_000, 5_000, 1_000),
    bag: int = 4,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of made-up clicks that depend on the numbers and on the categories.

    Args:
        global_batch: Samples of one batch.
        tables: How many categories of every kind there are.
        bag: Categories of every kind that a sample has.
        seed: Seed of the samples.

    Yields:
        `(dense, categories, clicked)`, as `Recommender.forward` takes them.
    """
    hidden = torch.Generator().manual_seed(12345)
    weights = torch.randn(DENSE, generator=hidden)
    taste = [torch.randn(rows, generator=hidden) for rows in tables]
    generator = torch.Generator().manual_seed(seed)
    while True:
        dense = torch.randn(global_batch, DENSE, generator=generator)
        # Few categories are common and many are rare, as in real logs.
        drawn = torch.rand(global_batch, len(tables), bag, generator=generator) ** 3
        categories = (drawn * torch.tensor(tables).view(1, -1, 1)).long()
        liking = sum(taste[i][categories[:, i]].mean(1) for i in range(len(tables)))
        chance = torch.sigmoid(dense @ weights + liking)
        yield dense, categories, torch.bernoulli(chance, generator=generator)
