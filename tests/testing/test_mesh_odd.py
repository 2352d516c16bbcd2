"""The law on meshes where things are odd: sizes that do not divide, dtypes, ties, masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import raypar as rp
from raypar.graph.opgraph import OpGraph
from raypar.plan import MeshSlice, Plan
from raypar.stages.recipe import Recipe
from raypar.testing import random_plan, random_sharding
from raypar.testing.equivalence import gaps, reference_run, run_graph
from tests._tiers import THOROUGH, examples

FEW, MANY = rp.Cluster.local(4), rp.Cluster.local(24)
EXACT = 1e-9
Shapes = list[tuple[int, ...]]


def sharded(graph: OpGraph, seed: int, meshes: Shapes, **options: Any) -> Plan:
    """A random plan with a random strategy for every op that has one."""
    zero = options.pop("zero", (0, 1, 2, 3))
    plan = random_plan(graph, FEW, seed=seed, **options)
    return random_sharding(graph, plan, MANY, seed=seed, meshes=meshes, share=0.9, zero=zero)


def worst(graph: OpGraph, batch: Any, plan: Plan, **options: Any) -> float:
    """The largest difference from the unsplit model, in terms of its scale."""
    wanted = reference_run(graph, batch, plan, steps=2, **options)
    found = run_graph(graph, batch, plan, steps=2, **options)
    gap = max(gaps(found, wanted), key=lambda g: g.ratio)
    print(f"worst: {gap.what} {gap.text}")
    return gap.ratio


def rows(*shape: int, seed: int = 1) -> torch.Tensor:
    """Random float64 inputs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def tokens(*shape: int, high: int) -> torch.Tensor:
    """Random indices below `high`."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


def sgd(params: Any) -> torch.optim.Optimizer:
    """For coarse dtypes: AdamW would blow their rounding up to whole steps."""
    return torch.optim.SGD(params, lr=1e-2)


def double(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64."""
    return make().double()


class Fused(nn.Module):
    """A projection whose features are read as three blocks, by ops that may be cut off from it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x) * 0.5
        first, second, third = hidden.chunk(3, -1)
        return self.out(torch.tanh(first * second) + third).square().mean()


def test_blocks_are_known_on_both_sides_of_a_cut() -> None:
    batch = rows(8, 8)
    graph = rp.capture(partial(double, Fused), batch)
    plan = random_plan(graph, FEW, seed=0, stages=2, replicas=1, microbatches=2)
    mesh = [
        MeshSlice(tuple(range(g * 2, g * 2 + 2)), (1, 2), ("data", "x"))
        for g, _ in plan.schedule.placement
    ]
    # The projection in blocks; cut off from the chunk that the blocks come from.
    ids = [op.id for op in graph.ops]
    stages = tuple(
        dataclasses.replace(stage, first=first, last=last, mesh=where, sharding=chosen)
        for stage, first, last, where, chosen in zip(
            plan.stages,
            (ids[0], "/mul#0"),
            ("inner/linear#0", ids[-1]),
            mesh,
            (
                {"inner/linear#0": "Rg S0/3 S0/3 > S1/3"},
                {"/mul#0": "S1/3 > S1/3", "/chunk#0": "S1/3 > S1 S1 S1"},
            ),
            strict=True,
        )
    )
    plan = dataclasses.replace(plan, stages=stages, cluster=MANY.shape)
    assert worst(graph, batch, plan) <= EXACT


class Odd(nn.Module):
    """Linear, norm, views, broadcasts and a scalar parameter, of any sizes, also 1."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first = nn.Linear(width, hidden * heads)
        self.norm = nn.LayerNorm(hidden * heads)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.rows = nn.Parameter(torch.ones(heads, 1))
        self.last = nn.Linear(hidden * heads, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        y = self.norm(self.first(x)).view(batch, length, self.heads, -1)
        y = y.transpose(1, 2) * self.gain
        mixed = torch.softmax(y @ y.transpose(-1, -2), -1) @ y
        mixed = torch.where(mixed > 0, mixed, mixed * self.rows.unsqueeze(-1))
        y = mixed.transpose(1, 2).reshape(batch, length, -1)
        return (self.last(y) + x).square().sum(-1).mean()


@settings(
    max_examples=examples(2, 12),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    width=st.integers(1, 6),
    hidden=st.integers(1, 3),
    heads=st.sampled_from((1, 2, 3, 6)),
    length=st.integers(1, 6),
    batch=st.sampled_from((1, 2, 3, 6)),
    meshes=st.lists(
        st.sampled_from([(), (1,), (2,), (3,), (6,), (1, 2), (2, 3), (3, 1)]),
        min_size=1,
        max_size=2,
    ),
    seed=st.integers(0, 999),
)
def test_any_sizes_on_any_mesh(
    width: int, hidden: int, heads: int, length: int, batch: int, meshes: Shapes, seed: int
) -> None:
    x = rows(batch, length, width)
    graph = rp.capture(partial(double, partial(Odd, width, hidden, heads)), x)
    plan = random_plan(graph, rp.Cluster.local(2), seed=seed)
    plan = random_sharding(graph, plan, MANY, seed=seed, meshes=meshes, share=0.9)
    assert worst(graph, x, plan) <= EXACT


class Tied(nn.Module):
    """One embedding at both ends, a second pair that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.mid = nn.Linear(8, 8)
        self.fixed = nn.Linear(8, 8)
        self.fixed.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.fixed(torch.tanh(self.mid(x))) + x
        x = self.fixed(torch.relu(self.mid(x)))
        logits = functional.linear(x, self.embed.weight)
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(
    ("zero", "replicas"),
    [
        pytest.param(zero, replicas, marks=[pytest.mark.thorough] * (zero % 2 != replicas - 1))
        for zero in range(4)
        for replicas in (1, 2)
    ],
)
def test_ties_and_frozen_parameters_over_unequal_meshes(zero: int, replicas: int) -> None:
    ids = tokens(4, 6, high=12)
    graph = rp.capture(partial(double, Tied), ids)
    cases = list(enumerate(([(2,), (1, 2)], [(), (3,)], [(2, 2), (2,)])))
    for seed, meshes in cases if THOROUGH else cases[(zero + replicas) % 3 :][:1]:
        plan = sharded(
            graph, seed, meshes, stages=3, replicas=replicas, microbatches=2, zero=[zero]
        )
        assert worst(graph, ids, plan, recipe=Recipe(clip_norm=0.05)) <= EXACT


class Kinds(nn.Module):
    """Integers and bools go from op to op, and from stage to stage."""

    seen: torch.Tensor
    running: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.out = nn.Linear(8, 16)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("running", torch.zeros(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        shifted = (ids * 3 + 1) % 16
        keep = (shifted != 5) & (ids > 1)
        x = self.embed(shifted)
        self.seen.add_(ids.shape[0])
        self.running.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        x = x.masked_fill(~keep.unsqueeze(-1), 0.0)
        order = torch.argsort(shifted, dim=1)
        x = torch.gather(x, 1, order.unsqueeze(-1).expand_as(x))
        logits = self.out(x)
        target = torch.where(keep, ids, torch.full_like(ids, -100))
        return functional.cross_entropy(logits.transpose(1, 2), target, ignore_index=-100)


def test_integers_bools_and_buffers_cross() -> None:
    ids = tokens(8, 6, high=16)
    graph = rp.capture(partial(double, Kinds), ids)
    for seed in range(examples(1, 4)):
        plan = sharded(graph, seed, [(2,), (2, 2)])
        assert worst(graph, ids, plan) <= EXACT


class Vision(nn.Module):
    """Grouped and strided convolutions, batch norm, pools, channels-last inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = self.deep(y.to(memory_format=torch.channels_last))
        y = self.up(y.permute(0, 1, 3, 2)).mean((2, 3))
        return functional.cross_entropy(self.last(y), target)


def test_grouped_convolutions_and_batch_norm() -> None:
    batch = (rows(8, 4, 8, 8), tokens(8, high=3))
    graph = rp.capture(partial(double, Vision), batch)
    for seed in range(examples(1, 4)):
        plan = sharded(graph, seed, [(2,), (4,), (2, 2)])
        assert worst(graph, batch, plan) <= EXACT


class Coarse(nn.Module):
    """Parameters of a coarse dtype, and a region in which autocast chooses another."""

    def __init__(self, region: torch.dtype) -> None:
        super().__init__()
        self.region = region
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=self.region):
            y = torch.nn.functional.gelu(self.first(x))
            y = self.norm(y)
        return self.last(y.to(self.last.weight.dtype)).float().square().mean()


@pytest.mark.parametrize(
    ("params", "region"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_coarse_dtypes_and_autocast(params: torch.dtype, region: torch.dtype) -> None:
    batch = rows(8, 8).to(params)
    graph = rp.capture(lambda: Coarse(region).to(params), batch)
    for seed in range(examples(1, 3)):
        plan = sharded(graph, seed, [(2,), (2, 2)])
        assert worst(graph, batch, plan, optimizer=sgd) <= 2e-2


class Masks(nn.Module):
    """Dropout of elements, rows and channels, and random numbers as such."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 8, 3, padding=1)
        self.second = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.dropout1d(self.first(x), 0.4)
        y = functional.dropout(self.second(y), 0.3)
        y = functional.feature_alpha_dropout(y, 0.2, True)
        y = y + 0.1 * torch.rand_like(y)
        keep = torch.empty(y.shape[0], 1, 1, dtype=y.dtype).bernoulli_(0.8)
        return (y * keep / 0.8).square().mean()


def test_masks_under_every_cut() -> None:
    batch = rows(8, 4, 6)
    graph = rp.capture(partial(double, Masks), batch)
    for seed in range(examples(1, 4)):
        plan = sharded(graph, seed, [(2,), (4,), (2, 2)])
        assert worst(graph, batch, plan) <= EXACT


class Twice(nn.Module):
    """Layers whose parameters several stages of one rank group use, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.layer(x)
        y = skip
        for _ in range(4):
            y = torch.tanh(self.layer(y * self.scale)) + skip
        return y.square().mean()


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved_1f1b"])
def test_a_layer_used_by_every_stage(schedule: str) -> None:
    batch = rows(8, 8)
    graph = rp.capture(partial(double, Twice), batch)
    for seed in range(examples(1, 3)):
        plan = sharded(
            graph, seed, [(2,), (2, 2)], stages=4, replicas=1, microbatches=4, schedules=[schedule]
        )
        assert worst(graph, batch, plan) <= EXACT
