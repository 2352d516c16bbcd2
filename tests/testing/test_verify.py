"""A plan that is right shows no difference; a fault that is put in is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import raypar as rp
from raypar.errors import DataError
from raypar.plan import MeshSlice
from raypar.sharding.blocks import annotate_blocks
from raypar.sharding.rules import base
from raypar.sharding.rules.base import Choice
from raypar.sharding.strategies import _CACHE, strategies
from raypar.stages.transfers import Transfers
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.verify import first_difference

CLUSTER = rp.Cluster.local(4)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        x = self.second(torch.relu(self.first(x)))
        return (self.out(torch.tanh(x)) ** 2).mean()


def _make():
    return _Net().double()


BATCHES = [torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def lie(monkeypatch):
    """Adds a choice to an op's rule that is not true."""

    def tell(name, inputs, outputs):
        honest = base.find_rule(name)

        def lying(op, size):
            return [*honest(op, size), Choice(inputs, outputs)]

        monkeypatch.setitem(base._RULES, name, lying)
        _CACHE.clear()

    yield tell
    _CACHE.clear()


def _plan(graph):
    """Two stages, cut behind the first relu; each on a mesh of 2 besides the replicas."""
    search = rp.SearchConfig(stages=2, replicas=1, microbatches=2)
    plan = rp.plan(graph, rp.Cluster.local(2), search)
    cut = graph.index["/relu#0"]
    slices = [MeshSlice((0, 1), (1, 2), ("data", "x")), MeshSlice((2, 3), (1, 2), ("data", "x"))]
    bounds = [(0, cut), (cut + 1, len(graph.ops) - 1)]
    stages = [
        dataclasses.replace(s, first=graph.ops[a].id, last=graph.ops[b].id, mesh=mesh)
        for s, (a, b), mesh in zip(plan.stages, bounds, slices, strict=True)
    ]
    return dataclasses.replace(plan, stages=tuple(stages), cluster=CLUSTER.shape)


def _shard(graph, plan, stage, op, wanted):
    """The plan with the first strategy of an op that `wanted` takes."""
    clean = graph.local(plan.local_batch)
    annotate_blocks(clean.graph)
    node = next(n for n in clean.ops if n.meta["id"] == op)
    text = next(str(s) for s in strategies(node, [2]) if wanted(str(s)))
    old = plan.stages[stage]
    new = dataclasses.replace(old, sharding={**old.sharding, op: text})
    stages = (*plan.stages[:stage], new, *plan.stages[stage + 1 :])
    return dataclasses.replace(plan, stages=stages)


@pytest.mark.parametrize(("name", "seed"), [("mlp", 0), ("masked_mean", 2), ("feature_dropout", 1)])
def test_plans_that_are_right_show_no_difference(name, seed):
    case = models.case(name)
    batches = [case.batch(i, 8) for i in range(2)]
    graph = rp.capture(case.model_fn, batches[0], case.loss_fn, case.batch_dims)
    cluster = rp.Cluster.local(8)
    plan = random_sharding(graph, random_plan(graph, cluster, seed=seed), cluster, seed=seed)
    assert first_difference(graph, plan, batches, steps=2) is None


def test_a_sum_that_goes_through_an_op_that_is_not_linear_is_named(lie):
    lie("relu", ("P",), ("P",))
    graph = rp.capture(_make, BATCHES[0])
    plan = _shard(graph, _plan(graph), 0, "first/linear#0", lambda s: s.endswith("> P"))
    plan = _shard(graph, plan, 0, "/relu#0", lambda s: s == "P > P")
    found = first_difference(graph, plan, BATCHES)
    assert (found.kind, found.tensor) == ("activation", "/relu#0")
    assert (found.op, found.strategy, found.stage) == ("/relu#0", "P > P", 0)
    assert (found.step, found.microbatch, found.replica) == (0, 0, 0)
    assert "test_verify.py" in found.source
    assert "differs by" in found.text
    assert "op '/relu#0' as 'P > P'" in str(found)


def test_a_lie_in_the_last_stage_is_seen_in_the_loss(lie):
    lie("tanh", ("P",), ("P",))
    graph = rp.capture(_make, BATCHES[0])
    plan = _shard(graph, _plan(graph), 1, "second/linear#0", lambda s: s.endswith("> P"))
    plan = _shard(graph, plan, 1, "/tanh#0", lambda s: s == "P > P")
    found = first_difference(graph, plan, BATCHES)
    assert (found.kind, found.op, found.stage) == ("loss", "/tanh#0", 1)


def test_a_gradient_that_is_not_summed_is_named(lie):
    # Each rank makes some columns from the whole input, whose gradient is a sum over the ranks.
    lie("linear", ("R", "S0", "S0"), ("S1",))
    graph = rp.capture(_make, BATCHES[0])
    plan = _shard(graph, _plan(graph), 1, "second/linear#0", lambda s: s == "R S0 S0 > S1")
    found = first_difference(graph, plan, BATCHES)
    assert (found.kind, found.tensor, found.stage) == ("gradient", "/relu#0", 1)
    assert (found.op, found.strategy) == ("second/linear#0", "R S0 S0 > S1")


def test_a_parameter_gradient_that_is_not_summed_is_named(lie):
    # Samples are cut, so that the weight's gradient is a sum over the ranks.
    lie("linear", ("S0", "R", "R"), ("S0",))
    graph = rp.capture(_make, BATCHES[0])
    plan = _shard(graph, _plan(graph), 0, "first/linear#0", lambda s: s == "S0 R R > S0")
    found = first_difference(graph, plan, BATCHES)
    assert found.kind == "parameter gradient"
    assert found.tensor in ("first.bias", "first.weight")
    assert (found.op, found.stage) == ("first/linear#0", 0)


def test_a_transfer_that_spoils_what_it_carries_is_named_by_its_edge(monkeypatch):
    honest = Transfers.receive

    def spoiled(self, now):
        value = honest(self, now)
        return value + 1 if now.kind == "RF" and now.microbatch == 1 else value

    monkeypatch.setattr(Transfers, "receive", spoiled)
    graph = rp.capture(_make, BATCHES[0])
    found = first_difference(graph, _plan(graph), BATCHES)
    assert (found.kind, found.tensor, found.stage) == ("received", "/relu#0", 1)
    assert (found.microbatch, found.op) == (1, None)


def test_an_optimizer_that_goes_another_way_is_seen_in_the_state():
    calls = []

    def uneven(params):
        calls.append(1)
        return torch.optim.SGD(params, lr=0.1 if len(calls) == 1 else 0.2)

    graph = rp.capture(_make, BATCHES[0])
    found = first_difference(graph, _plan(graph), BATCHES, optimizer=uneven)
    assert found.kind == "state"
    assert found.tensor == "first.weight"


def test_it_needs_batches():
    graph = rp.capture(_make, BATCHES[0])
    with pytest.raises(DataError, match="at least one"):
        first_difference(graph, _plan(graph), [])
