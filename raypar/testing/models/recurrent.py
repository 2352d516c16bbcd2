"""Recurrent and temporal-convolution models, batch first and time first."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from raypar.testing.models._batches import SEQ_LEN, VOCAB, floats, integers, language
from raypar.testing.models._case import register


def _sentences(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return integers(g, batch, SEQ_LEN), integers(g, batch, high=3)


def _time_major(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return integers(g, SEQ_LEN, batch), integers(g, batch, high=3)


class LSTMClassifier(nn.Module):
    """Embedding, two bidirectional LSTM layers, and a linear head over the last states."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.tokens = nn.Embedding(VOCAB, 20)
        self.lstm = nn.LSTM(20, 16, num_layers=2, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(64, 3)

    def forward(self, tokens: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        if not self.batch_first:
            x = x.transpose(0, 1)
        output, (hidden, _) = self.lstm(x)
        pooled = output.mean(dim=1 if self.batch_first else 0)
        features = torch.cat((hidden[-2], hidden[-1], pooled), dim=-1)
        return F.cross_entropy(self.head(features), label)


@register(_sentences)
def lstm() -> nn.Module:
    """A bidirectional two-layer LSTM, batch first."""
    return LSTMClassifier(batch_first=True)


@register(_sentences)
def lstm_time_first() -> nn.Module:
    """The same LSTM over [time, batch, features], transposed inside the model."""
    return LSTMClassifier(batch_first=False)


class GRULanguage(nn.Module):
    """A one-way GRU that predicts the next token, from a learned first state."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 16)
        self.start = nn.Parameter(torch.zeros(1, 1, 24))
        self.gru = nn.GRU(16, 24, batch_first=True)
        self.head = nn.Linear(24, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        start = self.start.expand(1, tokens.shape[0], 24).contiguous()
        output, _ = self.gru(self.tokens(tokens), start)
        return F.cross_entropy(self.head(output).permute(0, 2, 1), targets)


@register(language)
def gru() -> nn.Module:
    """A GRU language model."""
    return GRULanguage()


class TimeMajorRNN(nn.Module):
    """A GRU cell stepped by hand over tokens that come as [time, batch]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, 16)
        self.cell = nn.GRUCell(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        state = x.new_zeros(tokens.shape[1], 16)
        for step in x.unbind(0):
            state = self.cell(step, state)
        return F.cross_entropy(self.head(state), label)


@register(_time_major, batch_dims=(1, 0))
def gru_time_major() -> nn.Module:
    """Input whose batch dim is 1, and a recurrence unrolled in Python."""
    return TimeMajorRNN()


class CausalConv(nn.Module):
    """A dilated convolution that sees the past only, its weight split in length and direction."""

    def __init__(self, inside: int, outside: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv = weight_norm(nn.Conv1d(inside, outside, 3, dilation=dilation))
        self.skip = nn.Conv1d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.pad(x, (self.past, 0)))
        return F.leaky_relu(y, 0.1) + self.skip(x)


class TCN(nn.Module):
    """Temporal convolutions (Bai et al. 2018) over a multivariate series."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            CausalConv(5, 16, 1), CausalConv(16, 16, 2), CausalConv(16, 16, 4)
        )
        self.head = nn.Conv1d(16, 5, 1)

    def forward(self, series: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
        return F.huber_loss(self.head(self.body(series)), future)


def _series(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    walk = floats(g, batch, 5, 25).cumsum(-1) * 0.2
    return walk[..., :-1].contiguous(), walk[..., 1:].contiguous()


@register(_series)
def tcn() -> nn.Module:
    """1-D convolutions with weight norm as a parametrization."""
    return TCN()
