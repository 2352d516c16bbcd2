"""Planner `exhaustive`: it plays all there is, and says so where that is too much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from raypar import Cluster, capture
from raypar.errors import PlanError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Node
from raypar.mesh.devices import device_kind
from raypar.search.config import SearchConfig
from raypar.search.planners.base import get_planner
from raypar.search.planners.exhaustive import ExhaustiveSearch
from raypar.search.planners.uniform import UniformPlanner
from raypar.search.simulate import simulate


def _squares(out: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return out.square().mean()


def _stack() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.Tanh()) for _ in range(3)))


@pytest.fixture(scope="module")
def graph() -> OpGraph:
    return capture(_stack, torch.zeros(8, 96), _squares)


TOLD = SearchConfig(planner="exhaustive", tensor=1, zero=0, recompute="none")


def test_it_plays_as_many_as_it_counts_and_no_plan_twice(graph):
    search = ExhaustiveSearch(graph, Cluster.local(2), replace(TOLD, microbatches=2))
    plans = [entry.plan for entry in search.entries()]
    assert len(plans) == search.count() == search.played
    assert len({replace(p, predicted={}).to_json() for p in plans}) > 0.9 * len(plans)
    assert {p.replicas for p in plans} == {1, 2}
    assert {len({g for g, _ in p.schedule.placement}) for p in plans} == {1, 2}
    assert any(chunk for p in plans for _, chunk in p.schedule.placement)
    assert {p.schedule.name for p in plans} >= {"1f1b", "gpipe", "interleaved_1f1b"}


def test_nothing_of_the_space_is_faster_than_the_plan(graph):
    cluster = Cluster.local(2)
    plan = get_planner("exhaustive").plan(graph, cluster, replace(TOLD, microbatches=2))
    own = simulate(graph, plan, cluster).step_s
    assert own == pytest.approx(plan.predicted["step_s"])
    assert plan.planner == "exhaustive"
    for told in ({"stages": 1, "replicas": 2}, {"stages": 2, "replicas": 1}, {"stages": 1}):
        config = SearchConfig(microbatches=2, recompute="none", zero=0, **told)
        other = UniformPlanner().plan(graph, cluster, config)
        assert own <= simulate(graph, other, cluster).step_s * (1 + 1e-9)


def test_fixed_options_are_kept(graph):
    config = SearchConfig(
        planner="exhaustive", stages=2, replicas=1, microbatches=4, schedule="gpipe",
        recompute="full", zero=1, tensor=1, chunks=2,
    )  # fmt: skip
    plan = get_planner("exhaustive").plan(graph, Cluster.local(2), config)
    assert (len(plan.stages), plan.replicas, plan.microbatches) == (2, 1, 4)
    assert plan.schedule.name == "gpipe"
    assert plan.schedule.placement == ((0, 0), (0, 1))
    assert {(s.memory.recompute, s.memory.zero) for s in plan.stages} == {("full", 1)}


def test_the_faster_device_gets_more(graph):
    fast = device_kind("CPU")
    slow = replace(
        fast, name="slow CPU", flops={n: f / 8 for n, f in fast.flops.items()},
        bandwidth=fast.bandwidth / 8,
    )  # fmt: skip
    cluster = Cluster((Node.of(slow, 1, name="slow"), Node.of(fast, 1, name="fast")))
    plan = get_planner("exhaustive").plan(graph, cluster, replace(TOLD, microbatches=2, stages=2))
    ops_of = [0, 0]
    for stage in plan.stages:
        ops = graph.index[stage.last] - graph.index[stage.first] + 1
        for device in stage.mesh.devices:
            ops_of[device] += ops
    assert ops_of[1] > ops_of[0]


def test_large_spaces_are_refused_with_the_count_and_what_to_fix(graph):
    with pytest.raises(PlanError, match=r"would play [a-z ]*[\d,]{6,} plans .* up to 20,000") as e:
        get_planner("exhaustive").plan(graph, Cluster.local(4), SearchConfig())
    for key in ("search.stages", "search.zero", "search.recompute", "optuna"):
        assert key in str(e.value)
    few = replace(TOLD, microbatches=2, trials=3)
    with pytest.raises(PlanError, match=r"plays up to 3: .* set search\.trials: \d+"):
        get_planner("exhaustive").plan(graph, Cluster.local(2), few)


def test_a_space_without_a_plan_that_fits_says_what_is_missing(graph):
    config = replace(TOLD, microbatches=2, memory_fraction=1e-7)
    with pytest.raises(PlanError, match="memory"):
        get_planner("exhaustive").plan(graph, Cluster.local(2), config)
