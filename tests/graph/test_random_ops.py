"""Random numbers depend on seed, step, op and sample, and on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import raypar
from raypar.errors import CaptureError
from raypar.graph.randomops import mix, seeded

CPU = torch.device("cpu")


def draw(kind="bernoulli", shape=(64, 100), *, seed=0, step=0, first=0, key=1, p=0.7, before=1,
         keyed=True, samples=None):  # fmt: skip
    rng = torch.tensor([seed, step, first])
    rows = shape[0] if samples is None else samples
    dtype = torch.bool if kind == "bernoulli" else torch.float64
    return seeded(rng, key, list(shape), rows, before, keyed, kind, p, dtype, CPU)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_keep_rate(keep):
    mask = draw(p=keep)
    sigma = math.sqrt(keep * (1 - keep) / mask.numel())
    assert abs(mask.double().mean().item() - keep) < 4 * sigma


def test_moments():
    n = 64 * 100
    normal, uniform = draw("normal"), draw("uniform")
    assert abs(normal.mean().item()) < 4 / math.sqrt(n)
    assert abs(normal.var().item() - 1) < 4 * math.sqrt(2 / n)
    assert abs(uniform.mean().item() - 0.5) < 4 / math.sqrt(12 * n)
    assert uniform.min() >= 0
    assert uniform.max() < 1


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"key": 2}, {"first": 64}])
def test_numbers_differ_by(other):
    same = (draw() == draw(**other)).double().mean().item()
    assert abs(same - (0.7**2 + 0.3**2)) < 0.05  # as independent masks agree


def test_samples_differ():
    mask = draw()
    assert len({tuple(row.tolist()) for row in mask}) == 64


def test_unkeyed_numbers_are_the_same_for_every_part():
    assert torch.equal(draw(keyed=False, first=0), draw(keyed=False, first=64))


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_make_the_whole(parts):
    whole = draw(shape=(8, 5))
    size = 8 // parts
    pieces = [draw(shape=(size, 5), first=k * size) for k in range(parts)]
    assert torch.equal(torch.cat(pieces), whole)


def test_samples_inside_another_dim():
    whole = draw("normal", (3 * 8, 5), before=3, samples=8)
    halves = [draw("normal", (3 * 4, 5), before=3, samples=4, first=k) for k in (0, 4)]
    joined = torch.cat([h.view(3, 4, 5) for h in halves], 1).reshape(24, 5)
    assert torch.equal(joined, whole)


def test_mix_spreads():
    assert len({mix(a, b) for a in range(50) for b in range(50)}) == 2500


@pytest.mark.parametrize(
    "op", [lambda p: torch.multinomial(p, 2), lambda p: p[torch.randperm(len(p))], torch.poisson]
)
def test_random_ops_without_a_seeded_form_are_refused(op):
    class Model(nn.Module):
        def forward(self, x):
            return op(x).double().sum()

    with pytest.raises(CaptureError, match=r"test_random_ops\.py:\d+: the random op"):
        raypar.capture(Model, (torch.rand(8, 6),))
