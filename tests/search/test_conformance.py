"""The planners in the house pass the suite that a third party runs, and the suite can fail."""

from __future__ import annotations

import dataclasses

import pytest

from raypar.errors import PlanError
from raypar.plan import Plan
from raypar.search.planners.alpa import AlpaPlanner
from raypar.search.planners.base import Planner
from raypar.search.planners.uniform import UniformPlanner
from raypar.testing import PLANNER_CHECKS
from raypar.testing.planners import (
    plans_do_as_told,
    plans_fit,
    plans_keep_the_recipe,
    plans_repeat,
    plans_without_ray,
    refusals_are_plan_errors,
)

# It starts a process each time: once is enough for planners of one package.
OTHERS = [
    pytest.param(check, marks=[pytest.mark.thorough] * (check is plans_without_ray))
    for check in PLANNER_CHECKS
]


@pytest.mark.parametrize("check", OTHERS, ids=lambda check: check.__name__)
def test_uniform(check):
    check(UniformPlanner())


@pytest.mark.parametrize("check", PLANNER_CHECKS, ids=lambda check: check.__name__)
def test_alpa(check):
    check(AlpaPlanner())


class _Meddling(Planner):
    """Changes what `uniform` makes."""

    name = "uniform"

    def __init__(self, change):
        self._change = change

    def plan(self, graph, cluster, config) -> Plan:
        return self._change(UniformPlanner().plan(graph, cluster, config))


def _each_time_another():
    count = iter(range(1000))

    def change(plan: Plan) -> Plan:
        return dataclasses.replace(plan, torch=f">={next(count)}")

    return change


@pytest.mark.parametrize(
    ("check", "change"),
    [
        (plans_fit, lambda p: dataclasses.replace(p, microbatches=p.microbatches + 7)),
        (plans_fit, lambda p: dataclasses.replace(p, planner="other")),
        (plans_fit, lambda p: dataclasses.replace(p, torch=("2.13",))),
        (plans_repeat, _each_time_another()),
        (plans_do_as_told, lambda p: dataclasses.replace(p, microbatches=1)),
        (plans_keep_the_recipe, lambda p: dataclasses.replace(p, microbatches=2)),
    ],
)
def test_a_wrong_planner_fails(check, change):
    with pytest.raises((AssertionError, PlanError)):
        check(_Meddling(change))


def test_a_planner_that_never_refuses_fails():
    class Lenient(Planner):
        name = "uniform"

        def plan(self, graph, cluster, config) -> Plan:
            return UniformPlanner().plan(graph, cluster, type(config)())

    with pytest.raises(AssertionError, match="made a plan for"):
        refusals_are_plan_errors(Lenient())
