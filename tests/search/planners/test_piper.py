"""Planner piper on captured models: its plans train like the unsplit model, and obey."""

from __future__ import annotations

import pytest

import raypar as rp
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.search.planners.piper import PiperPlanner
from raypar.testing import PLANNER_CHECKS, assert_plan_equivalent, models
from raypar.testing.planners import plans_repeat, plans_train_exactly
from tests.search.test_alpa_odd import captured, nodes, slow

SHOWN = (plans_train_exactly, plans_repeat)
"""The test below trains plans of it as well; that plans repeat is shown of alpa."""
# The search around the program is alpa's, whose test runs the slow checks too.
CHECKS = [c for c in PLANNER_CHECKS if c.__name__ not in ("plans_fit", "plans_without_ray")]


@pytest.mark.parametrize(
    "check",
    [pytest.param(check, marks=[pytest.mark.thorough] * (check in SHOWN)) for check in CHECKS],
    ids=lambda check: check.__name__,
)
def test_it_is_a_planner(check):
    check(PiperPlanner())


def plan(graph: OpGraph, cluster: Cluster, **options: object) -> rp.Plan:
    """What the planner finds."""
    config = rp.SearchConfig(planner="piper", **options)  # type: ignore[arg-type]
    return rp.plan(graph, cluster, config)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"tensor": 2, "stages": 2, "microbatches": 2}),
        pytest.param(
            "t5",
            {"tensor": 1, "replicas": 1, "stages": 3, "microbatches": 2},
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "unet",
            {"tensor": 1, "replicas": 1, "stages": 3, "microbatches": 2},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_its_plans_train_exactly(name: str, options: dict[str, int]) -> None:
    case = models.case(name)
    graph = captured(name, 4)
    found = plan(graph, Cluster.local(4), zero=0, schedule="1f1b", **options)
    assert found.planner == "piper"
    assert len(found.stages) == options["stages"]
    check_plan(found, graph, Cluster.local(4))
    assert_plan_equivalent(
        case.model_fn,
        case.batch(0, 4),
        found,
        loss_fn=case.loss_fn,
        batch_dims=case.batch_dims,
        steps=1,
    )


def test_the_load_is_balanced_where_devices_are_slow() -> None:
    found = plan(captured("mlp"), nodes((slow("slow"), 2)), zero=0, replicas=1, tensor=1)
    assert len(found.stages) == 2
    loads = [s.predicted["forward_s"] + s.predicted["backward_s"] for s in found.stages]
    assert max(loads) < 0.8 * sum(loads)


def test_unequal_devices_cost_what_the_slowest_costs() -> None:
    cluster = nodes((slow("fast", 4e6), 2), (slow("slow", 1e6), 2))
    found = plan(captured("mlp"), cluster, zero=0, replicas=1, recompute="none")
    check_plan(found, captured("mlp"), cluster)


def test_a_model_too_large_is_refused() -> None:
    with pytest.raises(PlanError, match="memory"):
        plan(captured("mlp"), nodes((slow("tiny", memory=3000), 2)))
