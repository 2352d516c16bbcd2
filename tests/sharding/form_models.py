"""The smallest models that every way of sharding can be shown on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def real(*shape: int) -> torch.Tensor:
    """Numbers in double precision, the same for a shape every time."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def ids(high: int, *shape: int) -> torch.Tensor:
    """Whole numbers below `high`."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(3))


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x))).square().mean()


class Attention(nn.Module):
    """Causal attention of four query heads over `kv_heads` heads of keys and values."""

    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.grouped = kv_heads < 4
        self.q, self.k, self.v = (nn.Linear(8, 2 * n) for n in (4, kv_heads, kv_heads))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, -1, 2).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.out(y.transpose(1, 2).reshape(b, t, 8)).square().mean()


class FusedAttention(nn.Module):
    """The same with one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, 4, 2).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, 8)).square().mean()


class Vocabulary(nn.Module):
    """A table of words, a head and a cross-entropy over the same words."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.table(tokens))
        return F.cross_entropy(logits.view(-1, 10), targets.view(-1))


class Branch(nn.Module):
    """A residual branch with norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(6), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))).square().mean()


class Convolutions(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(F.relu(self.one(x))).square().mean()


class Normed(nn.Module):
    """A convolution and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().square().mean()


class Einsums(nn.Module):
    """Projections into heads and back, written as einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.back = (
            nn.Parameter(torch.randn(6, 4, 2)),
            nn.Parameter(torch.randn(4, 2, 6)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = torch.einsum("btd,dhk->bhtk", x, self.into).tanh()
        return torch.einsum("bhtk,hkd->btd", heads, self.back).square().mean()


class Experts(nn.Module):
    """Four experts with seats for groups of tokens (GShard, Lepikhin et al. 2020, section 3.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(6, 4))
        self.w1, self.w2 = nn.Parameter(torch.randn(4, 6, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, choice = F.softmax(x @ self.gate, dim=-1).max(dim=-1)
        chosen = F.one_hot(choice, 4)
        place = ((chosen.cumsum(dim=1) - chosen) * chosen).sum(dim=-1)
        seat = F.one_hot(place.clamp(max=2), 3) * (place < 3).unsqueeze(-1)
        dispatch = chosen.to(x.dtype).unsqueeze(-1) * seat.to(x.dtype).unsqueeze(-2)
        inside = torch.einsum("gnec,gnd->egcd", dispatch, x)
        hidden = F.gelu(torch.einsum("egcd,edh->egch", inside, self.w1))
        outside = torch.einsum("egch,ehd->egcd", hidden, self.w2)
        mixed = torch.einsum("gnec,egcd->gnd", dispatch * weight[..., None, None], outside)
        return (mixed - x).square().mean()


class Tables(nn.Module):
    """A table that is looked up and one whose rows are added up in bags."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bags = nn.Embedding(10, 6), nn.EmbeddingBag(8, 6, mode="sum")

    def forward(self, words: torch.Tensor, bag: torch.Tensor) -> torch.Tensor:
        return (self.words(words).sum(1) * self.bags(bag)).square().mean()
