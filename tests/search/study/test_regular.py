"""Regular plans as seeds: large clusters of equals, every stage alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import raypar as rp
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.search.config import SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.study.judge import Judge
from raypar.search.study.regular import regular_plans
from raypar.testing import models


@cache
def _graph() -> OpGraph:
    case = models.case("gpt")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


def _judge(devices: int = 8, **options: Any) -> Judge:
    return Judge(Workbench(_graph(), Cluster.local(devices), SearchConfig(**options)))


def test_each_shape_comes_once_the_best_first_and_can_be_carried_out() -> None:
    judge = _judge()
    found = regular_plans(judge.drafter)
    assert 2 <= len(found) <= 4
    assert len({(d.devices, d.groups) for d in found}) == len(found)
    for decisions in found:
        outcome = judge.look(decisions)
        assert outcome.plan is not None
        check_plan(outcome.plan, judge.bench.graph)
        assert len(outcome.plan.devices) == 8
        assert len(outcome.plan.stages) == decisions.groups * decisions.chunks
    assert found == regular_plans(_judge().drafter)


@pytest.mark.parametrize(
    "options", [{"stages": 2}, {"microbatches": 2}, {"schedule": "gpipe"}, {"zero": 1}]
)
def test_what_the_user_fixed_is_left_to_the_others(options: dict[str, Any]) -> None:
    assert regular_plans(_judge(**options).drafter) == []


def test_a_small_cluster_has_none() -> None:
    assert regular_plans(_judge(4).drafter) == []
