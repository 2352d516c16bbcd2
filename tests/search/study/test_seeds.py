"""Which planners give a study its first plans, and what they are asked where time is short."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

import raypar as rp
from raypar.errors import NothingFitsError, PlanError
from raypar.mesh.cluster import Cluster
from raypar.search import need
from raypar.search.interop.workbench import Workbench
from raypar.search.study import seeds as room
from raypar.search.study.seeds import seed_names, seeds
from raypar.testing import models


def _graph() -> rp.OpGraph:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


def _bench() -> Workbench:
    return Workbench(_graph(), Cluster.local(4), rp.SearchConfig())


def test_after_the_deadline_piper_is_asked_for_the_cut_of_the_plan_before() -> None:
    found = list(seeds(_bench(), time.perf_counter() - 1.0))
    (_, first), (_, second), (_, third) = found
    assert [name for name, _ in found] == ["alpa", "piper", "placement"]
    assert isinstance(first, rp.Plan)
    assert isinstance(second, rp.Plan)
    assert (second.replicas, second.microbatches) == (first.replicas, first.microbatches)
    assert str(third) == "no time was left for it"


def test_piper_is_not_asked_for_a_cut_that_turned_out_to_be_the_worse() -> None:
    better: list[rp.Plan] = []
    found = seeds(_bench(), time.perf_counter() - 1.0, best=lambda: better[0])
    _, first = next(found)
    assert isinstance(first, rp.Plan)
    better.append(replace(first, microbatches=2 * first.microbatches))
    (name, second), *_ = found
    assert name == "piper"
    assert "another cut of the batch" in str(second)


def test_long_after_the_deadline_no_other_planner_is_asked() -> None:
    over = time.perf_counter() - 1.0
    first, *others = seeds(_bench(), over, over)
    assert isinstance(first[1], rp.Plan)
    assert [name for name, _ in others] == ["piper", "placement"]
    assert not any(isinstance(plan, rp.Plan) for _, plan in others)


def test_of_long_models_piper_is_asked_for_that_cut_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = _bench()
    assert seed_names(bench.config, len(bench.units)) == ["alpa", "piper", "placement"]
    monkeypatch.setattr(room, "_SLOW_UNITS", 0)
    asked: list[rp.SearchConfig] = []
    real = room.get_planner

    def noted(name: str) -> object:
        planner = real(name)
        plan = planner.plan

        def planned(graph: rp.OpGraph, cluster: Cluster, config: rp.SearchConfig) -> rp.Plan:
            asked.append(config)
            return plan(graph, cluster, config)

        monkeypatch.setattr(planner, "plan", planned)
        return planner

    monkeypatch.setattr(room, "get_planner", noted)
    (name, first), (other, second) = seeds(bench, float("inf"))
    assert (name, other) == ("alpa", "piper")
    assert isinstance(first, rp.Plan)
    assert isinstance(second, rp.Plan)
    assert [config.replicas for config in asked] == ["auto", first.replicas]
    assert [config.microbatches for config in asked] == ["auto", first.microbatches]


def test_why_nothing_fits_is_told_once_and_only_if_nothing_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a large model on a large cluster it takes minutes to say."""
    graph, cluster = _graph(), Cluster.local(2)
    told: list[rp.SearchConfig] = []
    explain = need.leanest

    def noted(*args: Any) -> Any:
        told.append(args[2])
        return explain(*args)

    monkeypatch.setattr(need, "leanest", noted)
    config = rp.SearchConfig(memory_fraction=4e-6, cache=False, trials=4)
    found = list(seeds(Workbench(graph, cluster, config), float("inf")))
    assert [type(error) for _, error in found] == [NothingFitsError] * 3
    assert not told
    for planner in ("alpa", "optuna"):
        told.clear()
        with pytest.raises(PlanError, match="What binds is stage"):
            rp.plan(graph, cluster, replace(config, planner=planner))
        assert len(told) == 1
