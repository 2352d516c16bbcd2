"""Figures from steps, and the order in which plans run: no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import raypar
from raypar.errors import NonFiniteError, RayparError, StageDiedError
from raypar.plan import Plan
from raypar.search.measure import Measured
from raypar.stages.spec import StepReport
from raypar.train import measure
from raypar.train._measured import stage_seconds
from raypar.train._warm_actor import Held
from raypar.train.measure import RayMeasurer
from raypar.train.quiet import QUIET, Step, figure_of

CLUSTER = raypar.Cluster.local(2)
BATCH = (torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 12, bias=False))


GRAPH = raypar.capture(model, BATCH, nn.functional.cross_entropy)


def plan(microbatches: int, chunks: int = 1) -> Plan:
    options = raypar.SearchConfig(
        planner="uniform", stages=2, chunks=chunks, microbatches=microbatches
    )
    return raypar.plan(GRAPH, raypar.Cluster.local(2 // chunks), options)


def step(seconds: float, disturbed: float = 0.0, line: float = 0.0) -> Step:
    return Step(seconds, disturbed, (StepReport(0, seconds={"cpu": 0.01, "line": line}),))


# -- figures --------------------------------------------------------------------------------


def test_quiet_steps_make_the_figure_and_else_the_calmest_are_corrected() -> None:
    quiet = [step(1.0 + i / 100) for i in range(7)]
    noisy = [step(5.0, 0.5, line=3.0) for _ in range(20)]
    found = figure_of([*noisy, *quiet])
    assert (found.seconds, found.quiet, len(found.steps)) == (1.03, 7, 7)
    assert found.spread == pytest.approx(0.015 / 1.03)
    found = figure_of([*noisy, *quiet[:3]])
    assert (found.seconds, found.quiet, found.disturbed) == (1.51, 0, 0.25)
    assert figure_of(quiet[:2]).quiet == 2


@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 1)).map(lambda t: step(*t)), min_size=1)
)
def test_a_figure_lies_among_the_steps_it_rests_on(steps: list[Step]) -> None:
    found = figure_of(steps)
    times = [s.seconds for s in found.steps]
    assert min(times) <= found.seconds <= max(times)
    assert found.spread >= 0
    assert set(map(id, found.steps)) <= set(map(id, steps))
    if found.quiet:
        assert all(s.disturbed < QUIET for s in found.steps)


def test_seconds_of_stages_are_those_of_the_slowest_rank_per_microbatch() -> None:
    both = plan(4, chunks=2)
    cut = (replace(both.stages[0], last="1/relu#0"), replace(both.stages[1], first="2/linear#0"))
    both = replace(both, stages=cut)

    def of(forward: float) -> Step:
        passes = {0: (forward, 2.0), 1: (0.4, 0.8)}
        return Step(1.0, 0.0, (StepReport(0, passes=passes, seconds={"optimizer": 1.6}),))

    first, second = stage_seconds(GRAPH, both, [of(1.0), of(9.0), of(1.2)])
    assert (first.forward_s, first.backward_s) == (0.3, 0.5)
    assert (second.forward_s, second.backward_s) == (0.1, 0.2)
    # 16 of the 64 elements of the rank are those of the first linear.
    assert first.optimizer_s + second.optimizer_s == pytest.approx(1.6)
    assert first.optimizer_s == pytest.approx(0.4)


# -- the order of things --------------------------------------------------------------------


@dataclass
class FakeLoaded:
    name: int
    done: int = 0


@dataclass
class FakePool:
    """Plans are told apart by their microbatches, which are also their milliseconds."""

    log: list[tuple[str, int]] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)
    crowded: bool = False
    endless: int = 10**9
    there: set[int] = field(default_factory=set)
    deaths: int = 0
    free: int = 1 << 40

    def load(self, specs: Sequence[Any], runner: Any) -> FakeLoaded:
        name = specs[0].microbatches
        if self.deaths:
            self.deaths -= 1
            raise StageDiedError("it had died long ago")
        if name in self.broken or (self.crowded and self.there):
            raise RayparError(f"no room for {name}")
        self.there.add(name)
        return FakeLoaded(name)

    def run(self, loaded: FakeLoaded, count: int, deadline_s: float) -> list[Step]:
        self.log.append(("run", loaded.name))
        left = max(0, min(count, self.endless - loaded.done))
        loaded.done += count
        return [
            Step(loaded.name / 1e3, 0.0, (StepReport(0, passes={0: (1, 1), 1: (1, 1)}),))
        ] * left

    def held(self, loaded: FakeLoaded) -> list[Held]:
        return [Held(100, 0, self.free)]

    def unload(self, loaded: FakeLoaded) -> None:
        self.there.discard(loaded.name)

    def close(self) -> None:
        self.log.append(("close", 0))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakePool:
    made = FakePool()
    monkeypatch.setattr(measure, "WarmPool", lambda *_: made)
    return made


def measurer(**options: Any) -> RayMeasurer:
    return RayMeasurer(GRAPH, CLUSTER, BATCH, torch.optim.SGD, **options)


def test_plans_take_turns_that_move_on_from_round_to_round(fake: FakePool) -> None:
    plans = [plan(m) for m in (1, 2, 4)]
    found = measurer(at_once=2).measure_together(plans, seconds=0.01)
    assert [f.step_s for f in found if isinstance(f, Measured)] == [0.001, 0.002, 0.004]
    turns = [name for _, name in fake.log]
    warm = [1, 1, 2, 2]
    assert turns[: len(warm) + 12] == [*warm, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2, 1]
    assert set(turns[len(warm) + 12 :]) == {4}
    assert not fake.there


def test_plans_that_do_not_fit_side_by_side_follow_one_another(fake: FakePool) -> None:
    fake.free = 149  # each holds 100, and half as much is kept free
    found = measurer().measure_together([plan(m) for m in (1, 2, 4)], seconds=0.01)
    assert [f.step_s for f in found if isinstance(f, Measured)] == [0.001, 0.002, 0.004]
    names = [name for _, name in fake.log]
    assert names == sorted(names)


def test_a_plan_that_fails_beside_others_is_tried_alone(fake: FakePool) -> None:
    fake.broken, fake.crowded = {2}, True
    found = measurer().measure_together([plan(m) for m in (1, 2, 4)], seconds=0.01)
    assert [getattr(f, "step_s", str(f)) for f in found] == [0.001, "no room for 2", 0.004]
    assert not fake.there


def test_a_process_that_died_while_idle_costs_one_more_try(fake: FakePool) -> None:
    fake.deaths = 1
    assert measurer().measure(plan(1), seconds=0.0).step_s == 0.001
    fake.deaths = 2
    with pytest.raises(StageDiedError):
        measurer().measure(plan(1), seconds=0.0)


def test_steps_before_one_that_is_not_finite_count(fake: FakePool) -> None:
    fake.endless = 4
    assert measurer().measure(plan(1), seconds=0.1).steps == 2
    fake.endless = 2
    with pytest.raises(NonFiniteError, match="no steps to time"):
        measurer().measure(plan(1), seconds=0.1)
    assert not fake.there


def test_closed_is_closed(fake: FakePool) -> None:
    with measurer() as closed:
        pass
    closed.close()
    with pytest.raises(RayparError, match="make a new RayMeasurer"):
        closed.measure(plan(1), seconds=0.1)
