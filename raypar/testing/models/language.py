"""Decoder-only and encoder-only language models."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import (
    IGNORE,
    SEQ_LEN,
    VOCAB,
    floats,
    integers,
    language,
    masked_language,
)
from raypar.testing.models._blocks import Block
from raypar.testing.models._case import register

WIDTH, HEADS = 32, 4


class GPT(nn.Module):
    """A GPT whose output layer is its token embedding."""

    def __init__(self, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(SEQ_LEN, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(WIDTH, HEADS, dropout=dropout, causal=True) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.2)
        self.head.weight = self.tokens.weight

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.drop(self.tokens(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1))


@register(language)
def gpt() -> nn.Module:
    """GPT with tied embeddings."""
    return GPT()


@register(language, dropout=True)
def gpt_dropout() -> nn.Module:
    """GPT with dropout after the embedding, in attention and after every branch."""
    return GPT(dropout=0.1)


def _with_shared_mask(
    g: torch.Generator, batch: int
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    window = torch.ones(SEQ_LEN, SEQ_LEN).tril().triu(-5) > 0
    mask = floats(g, SEQ_LEN, SEQ_LEN).masked_fill(~window, float("-inf"))
    return language(g, batch), {"mask": mask}


@register(_with_shared_mask)
def gpt_shared_mask() -> nn.Module:
    """GPT that is given one [T, T] additive mask for all samples, as a keyword argument."""
    return GPT(layers=2)


class Bert(nn.Module):
    """A bidirectional encoder with a masked-token loss over uneven counts."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, SEQ_LEN, WIDTH) * 0.1)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(layers))
        self.transform = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        nn.init.normal_(self.tokens.weight, std=0.2)

    def encode(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, T] ids and their padding mask to [B, T, C]."""
        x = self.norm(self.tokens(tokens) + self.positions)
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x

    def masked_token_loss(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the tokens that have a label."""
        logits = F.linear(self.transform(x), self.tokens.weight, self.bias)
        return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return self.masked_token_loss(self.encode(tokens, mask), labels)


@register(masked_language, reduction="count")
def bert_own() -> nn.Module:
    """Masked language model with padding; the loss ignores the label -100."""
    return Bert()


class BertTwoLosses(Bert):
    """`Bert` with a second loss: a class for the whole sentence."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.classify = nn.Linear(WIDTH, 2)

    def forward(  # type: ignore[override]
        self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        x = self.encode(tokens, mask)
        sentence = self.classify(torch.tanh(self.pooler(x[:, 0])))
        return self.masked_token_loss(x, labels) + 0.5 * F.cross_entropy(sentence, order)


def _with_order(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    return (*masked_language(g, batch), integers(g, batch, high=2))


@register(_with_order, reduction="count")
def two_losses() -> nn.Module:
    """A mean over uneven counts plus half a mean over samples: two counts in one loss."""
    return BertTwoLosses()


class Albert(nn.Module):
    """One transformer block used four times, behind a factorised embedding."""

    def __init__(self, repeats: int = 4) -> None:
        super().__init__()
        self.repeats = repeats
        self.tokens = nn.Embedding(VOCAB, 16)
        self.widen = nn.Linear(16, WIDTH)
        self.block = Block(WIDTH, HEADS)
        self.narrow = nn.Linear(WIDTH, 16)
        nn.init.normal_(self.tokens.weight, std=0.5)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.widen(self.tokens(tokens))
        for _ in range(self.repeats):
            x = self.block(x)
        logits = self.narrow(x) @ self.tokens.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@register(language)
def albert() -> nn.Module:
    """Weights shared by calling one module several times."""
    return Albert()


class TorchEncoder(nn.Module):
    """`torch.nn.TransformerEncoder` as it comes, given a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(WIDTH, 3)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, label: torch.Tensor
    ) -> torch.Tensor:
        x = self.encoder(self.tokens(tokens), src_key_padding_mask=~mask)
        real = mask.unsqueeze(-1).to(x.dtype)
        pooled = (x * real).sum(dim=1) / real.sum(dim=1)
        return F.cross_entropy(self.classify(pooled), label)


def _classified(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    tokens, mask, _ = masked_language(g, batch)
    return tokens, mask, integers(g, batch, high=3)


@register(_classified)
def torch_encoder() -> nn.Module:
    """Encoder layers as torch has them, with a mean over each sample's real tokens."""
    return TorchEncoder()
