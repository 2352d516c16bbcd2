"""Planner `placement`: placements of captured models, also non-contiguous ones, train exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raypar import Cluster, capture
from raypar.errors import NothingFitsError, PlanError
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.planners.placement import PlacementPlanner, PlacementSearch
from raypar.search.simulate import simulate
from raypar.testing import PLANNER_CHECKS, assert_plan_equivalent, models
from raypar.testing.planners import plans_repeat, plans_without_ray, stack

TOLD = SearchConfig(planner="placement", replicas=1)


def _case(name: str) -> models.Case:
    return next(case for case in models.cases(hf=False) if case.name == name)


def _graph(case: models.Case) -> OpGraph:
    return capture(case.model_fn, case.batch(seed=0), case.loss_fn, case.batch_dims)


def _noncontiguous(case: models.Case, devices: int, microbatches: int) -> Plan:
    """A plan of the search with a rank group that holds several stages."""
    config = replace(TOLD, microbatches=microbatches)
    search = PlacementSearch(_graph(case), Cluster.local(devices), config)
    return next(p for p in search.plans() if any(chunk for _, chunk in p.schedule.placement))


SHOWN = (plans_without_ray, plans_repeat)
"""Each starts a process, or searches again: once is enough for planners of one package."""


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, marks=[pytest.mark.thorough] * (check in SHOWN))
        for check in PLANNER_CHECKS
    ],
    ids=lambda check: check.__name__,
)
def test_conformance(check):
    check(PlacementPlanner())


@pytest.mark.parametrize(
    ("name", "devices", "microbatches"),
    [
        ("gpt", 2, 1),
        pytest.param("t5", 2, 2, marks=pytest.mark.thorough),
        pytest.param("unet", 3, 2, marks=pytest.mark.thorough),
    ],
)
def test_noncontiguous_plans_train_exactly(name, devices, microbatches):
    case = _case(name)
    plan = _noncontiguous(case, devices, microbatches)
    assert len(plan.stages) > len(plan.devices)
    assert_plan_equivalent(
        case.model_fn,
        case.batch(seed=0),
        plan,
        loss_fn=case.loss_fn,
        batch_dims=case.batch_dims,
        steps=1,
    )


@pytest.mark.thorough  # on threads it is not
def test_a_noncontiguous_plan_trains_on_ray(ray_session):
    case = _case("gpt")
    plan = _noncontiguous(case, 2, 1)
    assert_plan_equivalent(
        case.model_fn,
        case.batch(seed=0),
        plan,
        loss_fn=case.loss_fn,
        batch_dims=case.batch_dims,
        steps=1,
        backend="ray",
    )


def test_the_plan_is_the_fastest_of_those_that_were_played():
    graph = _graph(_case("unet"))
    cluster = Cluster.local(3)
    config = replace(TOLD, microbatches=2)
    plan = PlacementPlanner().plan(graph, cluster, config)
    own = simulate(graph, plan, cluster).step_s
    assert own == pytest.approx(plan.predicted["step_s"])
    for other in PlacementSearch(graph, cluster, config).plans():
        assert own <= simulate(graph, other, cluster).step_s * (1 + 1e-9)


def test_unequal_devices_are_taken_to_be_as_the_slowest():
    graph = capture(stack, torch.zeros(8, 8, dtype=torch.float64), lambda out, batch: out.sum())
    slow_node = Cluster.virtual(2, 1, "L4").nodes[1]
    fast_node = Cluster.virtual(2, 1, "A100").nodes[0]
    cluster = Cluster((fast_node, slow_node))
    search = PlacementSearch(graph, cluster, replace(TOLD, microbatches=2))
    slow = PlacementSearch(graph, Cluster.virtual(2, 1, "L4"), replace(TOLD, microbatches=2))
    for mixed, alone in zip(search.outlines(), slow.outlines(), strict=True):
        assert mixed.way.seconds == pytest.approx(alone.way.seconds)
        assert mixed.way.memory == pytest.approx(alone.way.memory)


def test_what_it_cannot_do_is_refused():
    graph = capture(stack, torch.zeros(8, 8, dtype=torch.float64), lambda out, batch: out.sum())
    with pytest.raises(PlanError, match=r"search\.chunks is 2"):
        PlacementPlanner().plan(graph, Cluster.local(2), replace(TOLD, chunks=2))
    poor = replace(TOLD, memory_fraction=1e-9)
    with pytest.raises(NothingFitsError, match=r"planner placement .* memory"):
        PlacementPlanner().plan(graph, Cluster.local(2), poor)
