"""The last step of a search: what is told from few microbatches is what whole steps take."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search._sim_setting import setting_of
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import SCHEDULES, contest
from raypar.search.interop.likely import likely
from raypar.search.lowering import lowered_for_search
from raypar.search.planners.uniform import UniformPlanner
from raypar.search.simulate import simulate

CLUSTER = Cluster.virtual(3, 1, "V100")


@cache
def _graph() -> OpGraph:
    def model() -> nn.Module:
        return nn.Sequential(*[nn.Sequential(nn.Linear(2048, 2048), nn.GELU()) for _ in range(7)])

    rows = torch.zeros(1, 2048).expand(4096, -1)
    return capture(model, (rows, torch.zeros(4096, dtype=torch.long)), F.cross_entropy)


def _plan(stages: int, schedule: str = "1f1b", microbatches: int = 64) -> Plan:
    config = SearchConfig(
        planner="uniform", stages=stages, replicas=1, tensor=1, microbatches=microbatches,
        schedule=schedule,
    )  # fmt: skip
    return UniformPlanner().plan(_graph(), CLUSTER, config)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 3])
def test_a_step_is_continued_from_short_ones(stages: int, schedule: str) -> None:
    graph, plan, calibration = _graph(), _plan(stages, schedule), table_calibration(CLUSTER)
    lowered = lower_plan(graph, plan)
    setting = setting_of(graph, plan, lowered, CLUSTER, calibration, "analytic", None, 2)
    whole = simulate(graph, plan, CLUSTER, calibration=calibration, lowered=lowered)
    told = likely(plan, lowered, setting)
    assert told.step_s == pytest.approx(whole.step_s, rel=0.01)
    assert not told.whole
    assert told.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.02)


def test_the_winner_was_played_whole() -> None:
    graph, calibration = _graph(), table_calibration(CLUSTER)
    plans = [_plan(stages) for stages in (2, 3)]
    entries = contest(plans, graph, CLUSTER, calibration)
    best = min(
        simulate(graph, _plan(stages, schedule), CLUSTER, calibration=calibration).step_s
        for stages in (2, 3)
        for schedule in SCHEDULES
    )
    assert entries[0].overfull <= 1.0
    assert entries[0].step_s == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("memory_fraction", "moment_s", "played"),
    [(0.9, 0.0, {2}), (1e-6, 0.0, {2, 3}), (0.9, 1e9, {2, 3})],
)
def test_once_time_is_over_plans_are_played_until_one_fits_or_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, memory_fraction: float, moment_s: float, played: set[int]
) -> None:
    lowered: set[int] = set()

    def noted(graph: OpGraph, plan: Plan) -> LoweredPlan:
        lowered.add(len(plan.stages))
        return lowered_for_search(graph, plan)

    monkeypatch.setattr("raypar.search.interop.contest.lowered_for_search", noted)
    plans, calibration = [_plan(2), _plan(3)], table_calibration(CLUSTER)
    contest(
        plans, _graph(), CLUSTER, calibration,
        memory_fraction=memory_fraction, until=0.0, moment_s=moment_s,
    )  # fmt: skip
    assert lowered == played
