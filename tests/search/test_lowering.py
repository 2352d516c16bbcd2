"""A search lowers plans that differ in their schedule alone once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raypar import capture
from raypar.mesh.cluster import Cluster
from raypar.search import lowering
from raypar.search.config import SearchConfig
from raypar.search.lowering import forget_lowered, lowered_for_search
from raypar.search.plan import search
from raypar.testing import models, random_plan


def test_plans_are_lowered_once_until_the_search_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    case = models.case("mlp")
    graph = capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    plan = random_plan(graph, Cluster.local(2), seed=0, stages=2, replicas=1, schedules=("1f1b",))
    made = []
    real = lowering.lower_plan
    monkeypatch.setattr(lowering, "lower_plan", lambda *a: made.append(a) or real(*a))
    first = lowered_for_search(graph, plan)
    told = replace(plan, predicted={"step_s": 1.0}, planner="alpa", alternatives={"other": 2.0})
    assert lowered_for_search(graph, told).stages is first.stages
    other = replace(plan, schedule=replace(plan.schedule, name="gpipe"))
    again = lowered_for_search(graph, other)
    assert again.stages is first.stages
    assert again.lists == real(graph, other).lists
    assert len(made) == 1
    forget_lowered(graph)
    lowered_for_search(graph, plan)
    assert len(made) == 2


def test_nothing_is_kept_after_a_search() -> None:
    case = models.case("mlp")
    graph = capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    before = set(graph.memo)
    search(graph, Cluster.local(2), SearchConfig(planner="alpa", cache=False))
    assert lowering._KEY not in set(graph.memo) - before
