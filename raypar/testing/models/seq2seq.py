"""A T5-like encoder-decoder (Raffel et al. 2020): its memory skips over every decoder stage."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import SEQ_LEN, VOCAB, integers, lengths, padding_mask
from raypar.testing.models._case import register

WIDTH, HEADS, BUCKETS, TARGET_LEN, PAD = 32, 4, 9, 10, 0


class Attention(nn.Module):
    """Attention without scaling, with an additive bias, written out as T5 has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, std=0.1)

    def forward(self, x: torch.Tensor, memory: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def heads(y: torch.Tensor) -> torch.Tensor:
            return y.view(*y.shape[:2], HEADS, -1).permute(0, 2, 1, 3)

        q, k, v = heads(self.q(x)), heads(self.k(memory)), heads(self.v(memory))
        weights = (q @ k.transpose(-2, -1) + bias).softmax(dim=-1)
        return self.o((weights @ v).permute(0, 2, 1, 3).flatten(2))


class RelativeBias(nn.Module):
    """A learned bias per head and clipped distance between query and key."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(BUCKETS, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        distance = places[None, :] - places[:, None]
        bucket = distance.clamp(-(BUCKETS // 2), BUCKETS // 2) + BUCKETS // 2
        return self.table(bucket).permute(2, 0, 1).unsqueeze(0)


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory, and a ReLU feed-forward layer."""

    def __init__(self, cross: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 if cross else 2))
        self.attention = Attention()
        self.cross = Attention() if cross else None
        self.wi, self.wo = nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        bias: torch.Tensor,
        memory: torch.Tensor | None = None,
        memory_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, bias)
        if self.cross is not None and memory is not None and memory_bias is not None:
            x = x + self.cross(self.norms[1](x), memory, memory_bias)
        return x + self.wo(torch.relu(self.wi(self.norms[-1](x))))


class T5(nn.Module):
    """One embedding serves the encoder, the decoder and the output layer."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.encoder_bias, self.decoder_bias = RelativeBias(), RelativeBias()
        self.encoder = nn.ModuleList(Layer(cross=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(cross=True) for _ in range(layers))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def shift_right(self, targets: torch.Tensor) -> torch.Tensor:
        """The decoder's input: the targets one place later, behind a padding token."""
        shifted = targets.new_zeros(targets.shape)
        shifted[..., 1:] = targets[..., :-1].clone()
        shifted[..., 0] = PAD
        return shifted

    def forward(
        self, source: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        memory = self.tokens(source)
        hidden = torch.zeros(mask.shape, dtype=memory.dtype, device=mask.device)
        hidden = hidden.masked_fill(~mask, -1e9)[:, None, None, :]
        bias = self.encoder_bias(memory) + hidden
        for layer in self.encoder:
            memory = layer(memory, bias)
        memory = self.encoder_norm(memory)
        x = self.tokens(self.shift_right(targets))
        length = x.shape[1]
        future = torch.full((length, length), -1e9, dtype=x.dtype, device=x.device).triu(1)
        bias = self.decoder_bias(x) + future
        for layer in self.decoder:
            x = layer(x, bias, memory, hidden)
        logits = F.linear(self.decoder_norm(x) * WIDTH**-0.5, self.tokens.weight)
        return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))


def _batch(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    mask = padding_mask(lengths(g, batch, SEQ_LEN), SEQ_LEN)
    source = integers(g, batch, SEQ_LEN, low=1).masked_fill(~mask, PAD)
    return source, integers(g, batch, TARGET_LEN, low=1), mask


@register(_batch)
def t5() -> nn.Module:
    """Encoder-decoder with relative position bias and targets shifted in place."""
    return T5()
