"""What a graph of forward ops would lose is captured in another form, or refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import raypar
from raypar.errors import CaptureError
from tests.graph.law import trains_alike

B = 8


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)
        self.more()

    def more(self):
        pass

    def loss(self, h, y):
        return F.mse_loss(self.b(h), y)


def batch():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(B, 6, generator=generator), torch.randn(B, 6, generator=generator)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(Base):
    def forward(self, x, y):
        return self.loss(_Round.apply(self.a(x)), y)


class TensorHook(Base):
    def forward(self, x, y):
        h = self.a(x)
        h.register_hook(lambda g: -g)
        return self.loss(h, y)


class ParameterHook(Base):
    def more(self):
        self.a.weight.register_hook(lambda g: g * 0.5)

    def forward(self, x, y):
        return self.loss(self.a(x), y)


class ModuleHook(Base):
    def more(self):
        self.a.register_full_backward_hook(lambda module, given, taken: None)

    def forward(self, x, y):
        return self.loss(self.a(x), y)


class GradientPenalty(Base):
    def forward(self, x, y):
        x = x.clone().requires_grad_(True)
        out = self.a(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return self.loss(out, y) + gradient.norm()


class Counter(Base):
    def more(self):
        self.step = 0

    def forward(self, x, y):
        self.step += 1
        return self.loss(self.a(x), y) * min(1.0, self.step / 10)


class HiddenState(Base):
    def more(self):
        self.hidden = None

    def forward(self, x, y):
        h = self.a(x) if self.hidden is None else self.a(x) + self.hidden
        self.hidden = h.detach().mean(0)
        return self.loss(h, y)


class Lazy(Base):
    def more(self):
        self.a = nn.LazyLinear(8)

    def forward(self, x, y):
        return self.loss(self.a(x), y)


class ReadsAValue(Base):
    def forward(self, x, y):
        return self.loss(self.a(x), y) if x.sum().item() > 0 else self.loss(self.a(-x), y)


class ChangesABuffersShape(Base):
    def more(self):
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x, y):
        self.seen = torch.zeros(2)
        return self.loss(self.a(x), y)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (StraightThrough, "hand-written backward"),
        (TensorHook, "hook on a tensor's gradient"),
        (ParameterHook, "'a.weight' has a gradient hook"),
        (ModuleHook, "backward hook"),
        (GradientPenalty, "takes gradients itself"),
        (Counter, "'step'"),
        (HiddenState, "'hidden'"),
        (Lazy, "lazy modules"),
        (ReadsAValue, "asks for a tensor's value"),
        (ChangesABuffersShape, "'seen' from"),
    ],
)
def test_what_would_be_lost_is_refused(model, words):
    with pytest.raises(CaptureError, match=words):
        raypar.capture(model, batch())


@pytest.mark.parametrize("model", [StraightThrough, TensorHook, GradientPenalty, ReadsAValue])
def test_a_refusal_names_the_source_line(model):
    with pytest.raises(CaptureError, match=r"test_side_effects\.py:\d+"):
        raypar.capture(model, batch())


def test_a_refusal_leaves_torch_and_the_module_as_they_were():
    # torch.compile, in a test of this process before, turns the checks off for all.
    torch.distributions.Distribution.set_default_validate_args(True)
    module = HiddenState()
    apply, enter = torch.autograd.Function.__dict__["apply"], torch.inference_mode.__enter__
    with pytest.raises(CaptureError):
        raypar.capture(module, batch())
    assert module.hidden is None
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert torch.inference_mode.__enter__ is enter
    with pytest.raises(ValueError, match=r"std|scale"):
        torch.distributions.Normal(0.0, torch.tensor(-1.0))  # still checks its arguments


class Inference(Base):
    def forward(self, x, y):
        with torch.inference_mode():
            target = self.a(x) * 1
        return self.loss(self.a(x) + target.clone(), y)


class Reentrant(Base):
    def forward(self, x, y):
        h = checkpoint(lambda t: torch.tanh(self.b(t)), self.a(x), use_reentrant=True)
        return F.mse_loss(h, y)


class Reassigned(Base):
    def more(self):
        self.register_buffer("center", torch.zeros(8))

    def forward(self, x, y):
        h = self.a(x)
        self.center = 0.9 * self.center + 0.1 * h.detach().mean(0)
        return self.loss(h - self.center, y)


class OwnAverage(Base):
    def more(self):
        self.register_buffer("mean", torch.zeros(8, 6))

    def forward(self, x, y):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(self.a.weight, alpha=0.1)
        return self.loss(self.a(x) + F.linear(x, self.mean), y)


class Cache(Base):
    def more(self):
        self.table, self.width = None, 0

    def forward(self, x, y):
        if self.table is None or self.width != 6:
            self.table, self.width = torch.arange(6.0).cos(), 6
        self.last = self.a(x).detach()
        return self.loss(self.a(x * self.table), y)


class LooksAtAMask(Base):
    def forward(self, x, y):
        mask = torch.ones(6, 6).triu(1)
        return self.loss(self.a(x @ mask) if bool((mask == 0).any()) else self.a(x), y)


class Spectral(Base):
    def more(self):
        self.a = nn.utils.parametrizations.spectral_norm(self.a)

    def forward(self, x, y):
        return self.loss(self.a(x), y)


class Distribution(Base):
    def forward(self, x, y):
        mean, scale = self.b(self.a(x)), F.softplus(self.a(x)[:, :6])
        return -torch.distributions.Normal(mean, scale).log_prob(y).mean()


class ClassWeights(Base):
    def more(self):
        self.register_buffer("w", torch.arange(6.0) + 1)

    def forward(self, x, y):
        return F.cross_entropy(self.b(self.a(x)), y.argmax(1), weight=self.w, ignore_index=2)


class KeyMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x, y):
        tokens = torch.stack([x, y, x * y], 1)
        mask = tokens.sum(-1) > 1.0
        mask = mask & mask.logical_not().any(1, keepdim=True)
        out, weights = self.attention(tokens, tokens, tokens, key_padding_mask=mask)
        return out.square().mean() + weights.square().sum(-1).mean()


@pytest.mark.parametrize(
    ("model", "exact"),
    [
        (Inference, True),
        (Reentrant, True),
        (Reassigned, False),
        (OwnAverage, False),
        (Cache, True),
        (LooksAtAMask, True),
        (Spectral, False),
        (Distribution, True),
        (ClassWeights, True),
        (KeyMask, True),
    ],
)
def test_it_trains_like_the_unsplit_model(model, exact):
    trains_alike(model, batch(), exact=exact)
