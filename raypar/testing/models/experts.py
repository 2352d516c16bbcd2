"""Mixtures of experts: dense dispatch with a capacity, and a sparse loop over the experts."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import SEQ_LEN, VOCAB, language
from raypar.testing.models._blocks import SelfAttention
from raypar.testing.models._case import register

WIDTH, HEADS, EXPERTS, HIDDEN, TOP = 32, 4, 4, 48, 2


class DenseExperts(nn.Module):
    """Top-2 routing through one-hot masks under a capacity (GShard, Lepikhin et al. 2020, §2.2)."""

    def __init__(self, capacity_factor: float = 1.0) -> None:
        super().__init__()
        self.capacity_factor = capacity_factor
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.1)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) * 0.1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mixed [B, T, C] and the load-balancing loss."""
        flat = x.reshape(-1, WIDTH)
        count = flat.shape[0]
        capacity = math.ceil(self.capacity_factor * TOP * count / EXPERTS)
        probs = F.softmax(self.gate(flat), dim=-1)
        weight, choice = probs.topk(TOP, dim=-1)
        chosen = F.one_hot(choice, EXPERTS)  # [N, K, E]
        ahead = chosen.reshape(-1, EXPERTS).cumsum(dim=0).reshape(chosen.shape) - chosen
        place = (ahead * chosen).sum(dim=-1)  # each choice's place in its expert's queue
        kept = (place < capacity).to(x.dtype)
        seat = F.one_hot(place.clamp(max=capacity - 1), capacity).to(x.dtype)
        taken = chosen.to(x.dtype) * kept.unsqueeze(-1)
        dispatch = torch.einsum("nke,nkc->nec", taken, seat)
        combine = torch.einsum("nke,nkc->nec", taken * weight.unsqueeze(-1), seat)
        inside = torch.einsum("nec,nd->ecd", dispatch, flat)
        outside = torch.bmm(F.gelu(torch.bmm(inside, self.w1)), self.w2)
        load = chosen[:, 0].to(x.dtype).mean(dim=0)
        balance = EXPERTS * (load * probs.mean(dim=0)).sum()
        return torch.einsum("nec,ecd->nd", combine, outside).view_as(x), balance


class SparseExperts(nn.Module):
    """Top-2 routing that loops over the experts and gathers each one's own tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the mixed [B, T, C] and a zero."""
        flat = x.reshape(-1, WIDTH)
        weight, choice = F.softmax(self.gate(flat), dim=-1).topk(TOP, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(choice == index)
            out.index_add_(0, token, expert(flat[token]) * weight[token, slot, None])
        return out.view_as(x), x.new_zeros(())


class MoE(nn.Module):
    """A small causal language model whose feed-forward layers are mixtures of experts."""

    def __init__(self, experts: type[nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(SEQ_LEN, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.attention = nn.ModuleList(
            SelfAttention(WIDTH, HEADS, causal=True) for _ in range(layers)
        )
        self.mixtures = nn.ModuleList(experts() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight
        balance = x.new_zeros(())
        for index, (attention, mixture) in enumerate(
            zip(self.attention, self.mixtures, strict=True)
        ):
            x = x + attention(self.norms[2 * index](x))
            mixed, loss = mixture(self.norms[2 * index + 1](x))
            x, balance = x + mixed, balance + loss
        task = F.cross_entropy(self.head(x).view(-1, VOCAB), targets.view(-1))
        return task + 0.01 * balance


@register(language, feels_microbatches=True)
def moe_dense() -> nn.Module:
    """Capacity-limited experts: which tokens are dropped depends on the microbatch."""
    return MoE(DenseExperts)


@register(language, data_dependent=True)
def moe_sparse() -> nn.Module:
    """Experts that gather their tokens: shapes known only at run time."""
    return MoE(SparseExperts)
