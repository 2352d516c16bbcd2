"""The learned cost model: analytic without data, right about what it saw, careful elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from raypar import Cluster, SearchConfig, capture
from raypar import plan as make_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan, lower_plan
from raypar.mesh.calibration import table_calibration
from raypar.plan import MeshSlice, Plan
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.cost.base import StageCode, stage_code
from raypar.search.cost.collectives import CollectiveFit, axis_tier
from raypar.search.cost.features import (
    EXTRA,
    PIECES,
    TRAITS,
    Column,
    Pricer,
    StageWork,
    analytic_s,
    stage_work,
)
from raypar.search.cost.learned import LearnedCost, memory_factor
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.profiled import Seconds
from raypar.search.cost.regression import Row, WorkRegression
from raypar.search.cost.rows import CollectiveRow, StepRow
from raypar.search.cost.step_correction import StepCorrection, step_features
from raypar.search.cost.store import MeasurementStore
from raypar.search.cost.work import Work
from raypar.search.measure import Measured, StageSeconds
from raypar.search.simulate import simulate
from tests._tiers import examples

CLUSTER = Cluster.local(2)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return F.mse_loss(x, y)


@lru_cache
def _planned(stages: int = 2, tensor: int = 1) -> tuple[OpGraph, Plan, LoweredPlan]:
    graph = capture(Layers, (torch.randn(16, 96), torch.randn(16, 96)))
    search = SearchConfig(
        planner="uniform", stages=stages, replicas=1, tensor=tensor, microbatches=2,
        schedule="1f1b", recompute="none", zero=0,
    )  # fmt: skip
    plan = make_plan(graph, CLUSTER, search)
    return graph, plan, lower_plan(graph, plan)


def _stage(index: int = 0, stages: int = 2, tensor: int = 1) -> tuple[StageCode, MeshMachine]:
    _, plan, lowered = _planned(stages, tensor)
    return stage_code(lowered, plan, index), machine_of(CLUSTER, plan.stages[index].mesh)


def _times(code: StageCode, machine: MeshMachine, factor: float) -> Seconds:
    cost = AnalyticCost().stage_cost(code, machine)
    found = cost.forward_s, cost.backward_s, cost.backward_input_s, cost.backward_weight_s
    return Seconds(*(factor * s for s in found))


# ---- features -------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "tensor"), [(2, 1), (1, 2)])
def test_columns_add_up_to_the_analytic_seconds(stages: int, tensor: int) -> None:
    code, machine = _stage(0, stages, tensor)
    cost = AnalyticCost().stage_cost(code, machine)
    priced = Pricer(machine)(stage_work(code), 1)
    known = (
        cost.forward_s, cost.backward_s, cost.backward_input_s, cost.backward_weight_s,
        cost.optimizer_s,
    )  # fmt: skip
    assert [analytic_s(s) for s in priced.pieces] == pytest.approx(list(known), rel=1e-9)
    assert all(len(traits) == len(TRAITS) for traits in priced.traits)
    assert len(priced.pieces) == len(PIECES) + 1


def test_exchanges_are_columns_that_the_analytic_model_does_not_count() -> None:
    _, machine = _stage()
    own = Work(1e6, 1e4, matmul=True)
    exchange = Work(0.0, 1e6, kind="exchange")
    alone, both = (
        Pricer(machine)(StageWork(table), 1).pieces[0]
        for table in (((own, (1, 0, 0, 0)),), ((own, (1, 0, 0, 0)), (exchange, (3, 0, 0, 0))))
    )
    assert analytic_s(both) == pytest.approx(analytic_s(alone))
    calls = [s for c, s in both.items() if (c.family, c.kind) == (EXTRA, "calls")]
    assert calls == pytest.approx([30 * machine.overhead_s])


# ---- regression -----------------------------------------------------------------------------


def _row(product: float, memory: float, measured: float = 1.0, group: str = "") -> Row:
    seconds = {
        Column("CPU", "product", "product", 2, 1): product,
        Column("CPU", "memory", "exp", 1): memory,
    }
    return Row(seconds, (math.log10(product + memory), 0.0), measured, group)


def test_classes_get_factors_of_their_own() -> None:
    shares = [(1.0, 3.0), (2.0, 1.0), (3.0, 0.2), (0.3, 2.0), (1.5, 1.5), (2.5, 2.5)] * 8
    rows = [
        _row(1e-3 * p, 1e-3 * m, 1e-3 * (p + 1.6 * m), f"m{i % 4}")
        for i, (p, m) in enumerate(shares)
    ]
    model = WorkRegression()
    model.fit(rows)
    for product, memory, want in ((1e-3, 1e-5, 1.0), (1e-5, 1e-3, 1.6)):
        (found,) = model.predict([_row(product, memory)])
        assert math.exp(found.log) == pytest.approx(want, rel=0.15)


@settings(max_examples=examples(13, 40), deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(1e-9, 1e3)] * 2, st.floats(1e-9, 1e3), st.sampled_from("abcd")),
        max_size=12,
    ),
    st.floats(1e-9, 1e3),
    st.floats(0.0, 1e3),
)
def test_whatever_it_saw_it_says_something_finite(
    seen: list[tuple[float, float, float, str]], product: float, memory: float
) -> None:
    model = WorkRegression()
    model.fit([_row(*one) for one in seen])
    (found,) = model.predict([_row(product, memory)])
    assert math.isfinite(found.log)
    assert abs(found.log) <= 3.0
    assert 0.0 < found.sigma < math.inf


def test_one_outlier_among_many_counts_little() -> None:
    rows = [_row(1e-3, 1e-3, 2.2e-3, f"m{i % 5}") for i in range(20)]
    model = WorkRegression()
    model.fit([*rows, _row(1e-3, 1e-3, 50e-3, "odd")])
    (found,) = model.predict([_row(1e-3, 1e-3)])
    assert math.exp(found.log) == pytest.approx(1.1, rel=0.05)


def test_what_was_never_seen_stays_analytic_and_unsure() -> None:
    model = WorkRegression()
    model.fit([_row(1e-3, 1e-6, 1.5e-3, f"m{i % 4}") for i in range(16)])
    other = Row({Column("GPU", "product", "conv", 3, 2): 1e-3}, (-3.0, 0.0))
    (far,), (near,) = model.predict([other]), model.predict([_row(1e-3, 1e-6)])
    assert abs(far.log) < 0.5 * near.log
    assert far.sigma > near.sigma


# ---- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "tensor"), [(2, 1), (1, 2)])
def test_without_measurements_it_is_the_analytic_model(stages: int, tensor: int) -> None:
    code, machine = _stage(0, stages, tensor)
    found, sigma = LearnedCost().predict(code, machine)
    assert found == AnalyticCost().stage_cost(code, machine)
    assert sigma > 0.15


def test_what_it_observed_it_predicts() -> None:
    code, machine = _stage()
    other, _ = _stage(1)
    model = LearnedCost()
    before = model.predict(code, machine, alone=True)
    for _ in range(3):
        model.observe(code, machine, _times(code, machine, 1.4))
    model.refit()
    cost, sigma = model.predict(code, machine, alone=True)
    assert cost.forward_s == pytest.approx(1.4 * before[0].forward_s, rel=0.1)
    assert cost.backward_s == pytest.approx(1.4 * before[0].backward_s, rel=0.1)
    assert sigma < before[1]
    again = LearnedCost.from_store(model.store).predict(code, machine, alone=True)
    assert again[0].forward_s == pytest.approx(cost.forward_s)
    # What was learned of one stage speaks for another one of the same ops.
    analytic = AnalyticCost().stage_cost(other, machine)
    assert model.predict(other, machine, alone=True)[0].forward_s > 1.2 * analytic.forward_s


def test_stages_of_real_steps_are_learned_without_what_is_around_them() -> None:
    _, plan, lowered = _planned()
    code, machine = _stage()
    calibration = table_calibration(CLUSTER)
    cost = AnalyticCost().stage_cost(code, machine)
    own = StageSeconds(20 * cost.forward_s, 20 * cost.backward_s, 2 * cost.optimizer_s)
    odd = StageSeconds(1e-9, float("nan"), 0.0)  # nothing but overhead; not a figure
    model = LearnedCost()
    model.observe_step(lowered, plan, CLUSTER, calibration, Measured(1.0, 0.0, 3, 1.0, (own, odd)))
    (row,) = model.store.stages
    assert row.where == "together"
    assert row.ranks == 2
    assert row.seconds[0] < own.forward_s
    assert row.seconds[4] == own.optimizer_s


def test_simulation_takes_it_by_name_and_as_an_object(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path))
    graph, plan, lowered = _planned()
    plain = simulate(graph, plan, CLUSTER, lowered=lowered).step_s
    assert simulate(graph, plan, CLUSTER, cost="learned", lowered=lowered).step_s == plain
    model = LearnedCost(MeasurementStore.for_cluster(CLUSTER))
    for index in range(2):
        code, machine = _stage(index)
        model.observe(code, machine, _times(code, machine, 2.0))
    model.refit()
    named = simulate(graph, plan, CLUSTER, cost="learned", lowered=lowered).step_s
    given_ = simulate(graph, plan, CLUSTER, cost=model, lowered=lowered).step_s
    assert named == pytest.approx(given_)
    assert named > 1.05 * plain


# ---- collectives, memory, whole steps -------------------------------------------------------


def test_measured_collectives_correct_others_of_their_tier() -> None:
    calibration = table_calibration(CLUSTER)
    machine = machine_of(CLUSTER, MeshSlice((0, 1), (2,), ("x",)))
    assert axis_tier(machine, "x") == ("inside", 2)
    sizes = [1 << n for n in range(12, 26, 2)]
    rows = [
        CollectiveRow(kind, "inside", 2, n, 3.0 * machine.collective_s("x", kind, n), count=4)
        for n in sizes
        for kind in ("all_reduce", "all_gather")
    ]
    fit = CollectiveFit(CLUSTER, calibration, [*rows, replace(rows[0], size=64)])
    seen = fit.predict(machine, "x", "all_reduce", 1 << 19)
    other = fit.predict(machine, "x", "all_to_all", 1 << 19)
    assert math.exp(seen.log) == pytest.approx(3.0, rel=0.35)
    assert abs(other.log) < 0.1 * seen.log  # another kind was never measured
    assert other.sigma > seen.sigma


def test_memory_is_never_told_to_be_less() -> None:
    def rows(factor: float) -> list[StepRow]:
        return [StepRow({}, 1.0, 1.0, 1000, int(1000 * factor))] * 20

    assert memory_factor([]) == memory_factor(rows(0.7)) == 1.0
    assert memory_factor(rows(1.3)) == pytest.approx(1.3, rel=0.02)


def test_step_correction_learns_a_level_and_is_surer_near_what_it_saw() -> None:
    graph, plan, lowered = _planned()
    played = simulate(graph, plan, CLUSTER, lowered=lowered)
    features = step_features(plan, played)
    assert all(math.isfinite(v) for v in features.values())
    factor, wide = StepCorrection().predict(features)
    assert factor == 1.0
    assert wide > 0.2
    rows = [
        StepRow({**features, "microbatches": m}, 1.0, 1.3 * (1.0 + 0.02 * m)) for m in range(1, 5)
    ]
    fitted = StepCorrection.fit(rows)
    factor, near = fitted.predict({**features, "microbatches": 2.5})
    assert factor == pytest.approx(1.365, rel=0.03)
    _, far = fitted.predict({**features, "microbatches": 9.0, "stages": 6.0, "schedule:new": 1.0})
    assert near < far < 2.0
    assert near < wide
