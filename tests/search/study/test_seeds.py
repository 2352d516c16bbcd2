"""Which planners give a study its first plans, and what they are asked where time is short."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

import raypar as rp
from raypar.mesh.cluster import Cluster
from raypar.search.interop.workbench import Workbench
from raypar.search.study import seeds as room
from raypar.search.study.seeds import seed_names, seeds
from raypar.testing import models


def _bench() -> Workbench:
    case = models.case("mlp")
    graph = rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)
    return Workbench(graph, Cluster.local(4), rp.SearchConfig())


def test_after_the_deadline_piper_is_asked_for_the_cut_of_the_plan_before() -> None:
    found = list(seeds(_bench(), time.perf_counter() - 1.0))
    (_, first, _), (_, second, _), (_, third, reason) = found
    assert [name for name, *_ in found] == ["alpa", "piper", "placement"]
    assert first is not None
    assert second is not None
    assert (second.replicas, second.microbatches) == (first.replicas, first.microbatches)
    assert third is None
    assert reason == "no time was left for it"


def test_piper_is_not_asked_for_a_cut_that_turned_out_to_be_the_worse() -> None:
    better: list[rp.Plan] = []
    found = seeds(_bench(), time.perf_counter() - 1.0, best=lambda: better[0])
    _, first, _ = next(found)
    assert first is not None
    better.append(replace(first, microbatches=2 * first.microbatches))
    (name, second, reason), *_ = found
    assert (name, second) == ("piper", None)
    assert "another cut of the batch" in reason


def test_long_after_the_deadline_no_other_planner_is_asked() -> None:
    over = time.perf_counter() - 1.0
    first, *others = seeds(_bench(), over, over)
    assert first[1] is not None
    assert [(name, plan) for name, plan, _ in others] == [("piper", None), ("placement", None)]


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
    (name, first, _), (other, second, _) = seeds(bench, float("inf"))
    assert (name, other) == ("alpa", "piper")
    assert first is not None
    assert second is not None
    assert [config.replicas for config in asked] == ["auto", first.replicas]
    assert [config.microbatches for config in asked] == ["auto", first.microbatches]
