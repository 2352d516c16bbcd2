"""Perceptrons, recommenders, and models odd in what they are given or in what they hold."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import floats, integers
from raypar.testing.models._case import register

FEATURES = 20


def _classified(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return floats(g, batch, FEATURES), integers(g, batch, high=5)


def class_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, as a loss function of its own."""
    return F.cross_entropy(logits, target)


@register(_classified, loss_fn=class_loss)
def mlp() -> nn.Module:
    """Linear layers whose output is logits; the loss comes from outside."""
    return nn.Sequential(
        nn.Linear(FEATURES, 32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Softplus(),
        nn.Linear(32, 5),
    )


class SumLoss(nn.Module):
    """A gated regressor whose loss is a sum over samples and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 48)
        self.norm = nn.RMSNorm(24)
        self.out = nn.Bilinear(24, FEATURES, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.out(self.norm(F.glu(self.hidden(x))), x), y, reduction="sum")


def _regression(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return floats(g, batch, FEATURES), floats(g, batch, 3)


@register(_regression, reduction="sum")
def sum_loss() -> nn.Module:
    """A loss that adds up over microbatches instead of averaging."""
    return SumLoss()


class DLRM(nn.Module):
    """Embedding bags, pairwise dot products, and two perceptrons (Naumov et al. 2019)."""

    pairs: torch.Tensor

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(rows, width, mode=mode)
            for rows, mode in ((50, "sum"), (70, "mean"), (30, "sum"))
        )
        self.bottom = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, width))
        count = len(self.bags) + 1
        self.register_buffer("pairs", torch.tril_indices(count, count, offset=-1))
        self.top = nn.Sequential(
            nn.Linear(width + count * (count - 1) // 2, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(
        self, dense: torch.Tensor, sparse: torch.Tensor, click: torch.Tensor
    ) -> torch.Tensor:
        x = self.bottom(dense)
        columns = [x, *(bag(sparse[:, i]) for i, bag in enumerate(self.bags))]
        stacked = torch.stack(columns, dim=1)  # [B, columns, width]
        dots = torch.bmm(stacked, stacked.transpose(1, 2))
        features = torch.cat((x, dots[:, self.pairs[0], self.pairs[1]]), dim=1)
        return F.binary_cross_entropy_with_logits(self.top(features).squeeze(-1), click)


def _clicks(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    ids = integers(g, batch, 3, 4, high=30)
    return floats(g, batch, FEATURES), ids, integers(g, batch, high=2).to(torch.float64)


@register(_clicks)
def dlrm() -> nn.Module:
    """A recommender over embedding bags that sum or average."""
    return DLRM()


class PartlyFrozen(nn.Module):
    """A frozen first layer, an unused parameter, a scalar one, and a constant buffer."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Linear(32, 32))
        self.adapter = nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(7))
        self.register_buffer("shift", torch.linspace(-1, 1, FEATURES))
        self.backbone.requires_grad_(False)
        self.head.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            features = self.backbone(x - self.shift)
        x = features + F.silu(self.adapter(features))
        return F.cross_entropy(self.head(x) / self.temperature, label)


@register(_classified)
def partly_frozen() -> nn.Module:
    """Frozen and unused parameters, and a no_grad region."""
    return PartlyFrozen()


class Siamese(nn.Module):
    """One encoder over both sides of a pair; the loss is a hinge on their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(FEATURES, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 16)
        )

    def forward(self, left: torch.Tensor, right: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        a = F.normalize(self.encoder(left), dim=-1)
        b = F.normalize(self.encoder(right), dim=-1)
        distance = (a - b).pow(2).sum(dim=-1)
        apart = F.relu(1.0 - (distance + 1e-6).sqrt()).pow(2)
        return torch.where(same, distance, apart).mean()


def _pairs(g: torch.Generator, batch: int) -> tuple[torch.Tensor, ...]:
    same = integers(g, batch, high=2).bool()
    return floats(g, batch, FEATURES), floats(g, batch, FEATURES), same


@register(_pairs)
def siamese() -> nn.Module:
    """An encoder called twice in one forward pass."""
    return Siamese()


class Contrastive(Siamese):
    """The same encoder, with every other sample of the batch as a negative."""

    def forward(  # type: ignore[override]
        self, left: torch.Tensor, right: torch.Tensor
    ) -> torch.Tensor:
        a = F.normalize(self.encoder(left), dim=-1)
        b = F.normalize(self.encoder(right), dim=-1)
        return F.cross_entropy(a @ b.t() / 0.1, torch.arange(a.shape[0], device=a.device))


def _views(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    base = floats(g, batch, FEATURES)
    return base + 0.1 * floats(g, batch, FEATURES), base


@register(_views, feels_microbatches=True)
def contrastive() -> nn.Module:
    """A loss with in-batch negatives: it mixes the samples of a microbatch."""
    return Contrastive()


class KeywordOnly(nn.Module):
    """Takes keyword arguments only, among them a flag and an optional tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, 1)

    def forward(
        self,
        *,
        features: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        gated: bool = False,
        power: float = 1.0,
    ) -> torch.Tensor:
        if gated:
            features = features * torch.sigmoid(self.gate(features))
        error = (self.out(features)[:, 0] - target).abs() ** power
        return (error if weight is None else error * weight).mean()


def _keywords(g: torch.Generator, batch: int) -> dict[str, object]:
    features, target = floats(g, batch, FEATURES), floats(g, batch)
    return {"features": features, "target": target, "weight": None, "gated": True, "power": 2.0}


@register(_keywords)
def keyword_only() -> nn.Module:
    """A dict batch that holds a bool, a float and a None beside its tensors."""
    return KeywordOnly()


class Autoencoder(nn.Module):
    """A batch that is one tensor; the output is a dict-like object with the loss in it."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(FEATURES, 6)
        self.decode = nn.Linear(6, FEATURES)

    def forward(self, x: torch.Tensor) -> Reconstruction:
        code = torch.tanh(self.encode(x))
        loss = F.l1_loss(self.decode(code), x) + 1e-2 * code.square().mean()
        return Reconstruction(loss, code)


class Reconstruction:
    """What `Autoencoder` returns: the loss and the code."""

    def __init__(self, loss: torch.Tensor, code: torch.Tensor) -> None:
        self.loss, self.code = loss, code


def _single(g: torch.Generator, batch: int) -> torch.Tensor:
    return floats(g, batch, FEATURES)


@register(_single)
def autoencoder() -> nn.Module:
    """One bare tensor in, an object with ``.loss`` out."""
    return Autoencoder()
