"""Regular plans as seeds: large clusters of equals, every stage alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

import raypar as rp
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster, Node
from raypar.plan import Plan
from raypar.schedules.check import check_lists
from raypar.schedules.compile import compile_schedule
from raypar.search.config import SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.plan import search
from raypar.search.study import seeding
from raypar.search.study.draft import Draft, Drafter, held_per_chunk
from raypar.search.study.judge import Judge, Outcome
from raypar.search.study.obey import INTERLEAVED
from raypar.search.study.proposals import Proposals
from raypar.search.study.regular import regular_plans
from raypar.search.study.seeding import Seeding
from raypar.search.study.space import Decisions
from raypar.testing import models
from raypar.testing.schedules import chain_io


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


def test_they_are_ranked_without_programs_of_two_axes_nor_need_whole_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int | None, int, int, int]] = []
    real = Drafter.draft

    def noted(self: Drafter, decisions: Decisions, *rest: Any, axes: int | None = None) -> Draft:
        d = decisions
        asked.append((axes, d.groups, d.chunks, self.space.split_of(d).microbatches))
        return real(self, decisions, *rest, axes=axes)

    monkeypatch.setattr(Drafter, "draft", noted)
    judge = Judge(Workbench(_graph(), Cluster.local(12), SearchConfig()))
    found = regular_plans(judge.drafter)
    assert {axes for axes, *_ in asked} == {1}
    # Rounds of microbatches through the chunks of three groups, the last of which is not whole.
    assert any(chunks > 1 and parts % groups for _, groups, chunks, parts in asked)
    for decisions in found:
        outcome = judge.look(decisions)
        assert outcome.plan is not None
        check_plan(outcome.plan, judge.bench.graph)


@pytest.mark.parametrize(
    "options", [{"stages": 2}, {"microbatches": 2}, {"schedule": "gpipe"}, {"zero": 1}]
)
def test_what_the_user_fixed_is_left_to_the_others(options: dict[str, Any]) -> None:
    assert regular_plans(_judge(**options).drafter) == []


@pytest.mark.parametrize("schedule", INTERLEAVED)
@pytest.mark.parametrize(("groups", "chunks", "microbatches"), [(4, 2, 8), (4, 3, 24), (2, 4, 2)])
def test_drafts_count_what_chunks_hold(
    schedule: str, groups: int, chunks: int, microbatches: int
) -> None:
    io = chain_io(groups * chunks, groups)
    report = check_lists(compile_schedule(schedule, io, microbatches), io, microbatches)
    most = max(report.peak_saved_bytes((1,) * io.n_stages))
    counted = chunks * held_per_chunk(schedule, groups, chunks, microbatches)
    assert most <= counted < most + chunks


def test_where_devices_differ_stages_of_one_size_are_cut_by_the_solver() -> None:
    nodes = (Node.of("A100", 4), Node.of("L4", 4, name="node1"))
    judge = Judge(Workbench(_graph(), Cluster(nodes, "unequal"), SearchConfig()))
    found = regular_plans(judge.drafter)
    assert 2 <= len(found) <= 4
    assert len({(d.devices, d.replicas) for d in found}) == len(found)
    assert {(d.groups, d.chunks) for d in found} == {(0, 1)}
    for decisions in found:
        outcome = judge.look(decisions, axes=1)
        assert outcome.plan is not None
        check_plan(outcome.plan, judge.bench.graph)
        sizes = {len(stage.mesh.devices) for stage in outcome.plan.stages}
        assert sizes == {decisions.devices * decisions.replicas}


def test_a_small_cluster_has_none() -> None:
    assert regular_plans(_judge(4).drafter) == []


@pytest.mark.thorough  # a share of a budget
def test_seeds_that_take_all_their_time_leave_some_for_regular_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seeding, "_SEED_SHARE", 0.0)
    config = SearchConfig(trials=8, budget_s=60)
    _, record = search(_graph(), Cluster.local(8), config)
    assert "regular" in {trial.proposer for trial in record.trials}


def _seeding(
    judge: Judge,
    written: list[tuple[str, Outcome]],
    ago_s: float = 0.0,
    best: Callable[[], Plan | None] = lambda: None,
) -> Seeding:
    config = judge.bench.config
    proposals = Proposals(config, "seeding", judge.space, parallel=False)
    return Seeding(
        judge,
        proposals,
        {},
        lambda asked, looked: written.extend(looked),
        room=lambda: 8 - len(written),
        best=best,
        began=time.perf_counter() - ago_s,
        budget_s=60.0,
    )


def _that_tells_the_best(
    judge: Judge, ago_s: float = 0.0
) -> tuple[Seeding, list[tuple[str, Outcome]]]:
    written: list[tuple[str, Outcome]] = []

    def best() -> Plan | None:
        kept = [outcome for _, outcome in written if outcome.state == "kept"]
        return min(kept, key=lambda outcome: outcome.predicted_s).plan if kept else None

    its = _seeding(judge, written, ago_s, best=best)
    its.room = lambda: 100
    return its, written


def test_regular_plans_come_before_planners_that_are_asked_although_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = _judge(seeds="auto")
    (first, *_) = regular_plans(judge.drafter)
    plan = judge.look(first).plan
    assert plan is not None
    odd = PlanError("it is odd")
    found = [("alpa", plan), ("piper", odd), ("placement", plan)]
    monkeypatch.setattr(seeding, "seeds", lambda *_: iter(found))
    orders = []
    for ago_s in (60.0, 0.0):
        written: list[tuple[str, Outcome]] = []
        its = _seeding(judge, written, ago_s)
        its.exact()
        its.regular()
        orders.append([name for name, _ in written])
        assert its.refused == {"piper": odd}
    over, plenty = orders
    assert over[0] == plenty[0] == "alpa"
    assert "regular" in over
    assert over[-1] == "placement"
    assert plenty[-1] == "regular"


def test_the_best_is_looked_at_under_the_other_schedules_at_once() -> None:
    judge = _judge()
    its, written = _that_tells_the_best(judge)
    its.regular()
    (first, *_) = regular_plans(judge.drafter)
    names = judge.space.schedules if first.chunks == 1 else judge.space.interleaved
    assert len(names) > 1
    assert {replace(first, schedule=name) for name in names} <= set(its.known)
    told = [outcome.plan.schedule.name for _, outcome in written[: len(names)] if outcome.plan]
    assert sorted(told) == sorted(names)
    for name in names:
        played = its.known[replace(first, schedule=name)].plan
        assert played is not None
        assert played.schedule.name == name


@pytest.mark.parametrize(("close", "asked"), [(1e9, True), (0.0, False)])
def test_plans_near_the_best_are_looked_at_under_the_other_schedules_too(
    monkeypatch: pytest.MonkeyPatch, close: float, asked: bool
) -> None:
    monkeypatch.setattr(seeding, "_CLOSE", close)
    judge = _judge()
    its, _ = _that_tells_the_best(judge)
    its.regular()
    found = regular_plans(judge.drafter)
    looked = [d for d in found if its.known[d].state == "kept"]
    assert len(looked) > 1
    for decisions in looked:
        interleaved = decisions.chunks > 1
        names = judge.space.interleaved if interleaved else judge.space.schedules
        others = {replace(decisions, schedule=n) for n in names} - {decisions}
        assert (others <= set(its.known)) is asked


def test_other_schedules_leave_trials_for_the_regular_plans_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seeding, "_CLOSE", 1e9)
    monkeypatch.setattr(seeding, "_two_axes", lambda plan: False)
    judge = _judge()
    found = regular_plans(judge.drafter)
    its, written = _that_tells_the_best(judge)
    its.room = lambda: len(found) - len(written)
    its.regular()
    assert list(its.known) == found


def test_other_schedules_are_left_out_when_time_is_over() -> None:
    its, written = _that_tells_the_best(_judge(), ago_s=79.0)
    its.regular()
    assert [name for name, _ in written] == ["regular"]


@pytest.mark.parametrize(("takes_s", "looks"), [(20.0, 1), (12.0, 3)])
def test_no_plan_is_begun_that_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, looks: int
) -> None:
    """Of 60 s, 40 are over; at 78 all are to have been looked at."""
    judge = _judge()
    its = _seeding(judge, [])
    its.room = lambda: 100
    over, looked, real = 40.0, 0, Judge.look

    def look(judge: Judge, decisions: Decisions, *, axes: int | None = None) -> Outcome:
        nonlocal over, looked
        over, looked = over + takes_s, looked + 1
        return real(judge, decisions, axes=axes)

    monkeypatch.setattr(Judge, "look", look)
    clock = SimpleNamespace(perf_counter=lambda: its.began + over)
    monkeypatch.setattr(seeding, "time", clock)
    monkeypatch.setattr(seeding, "_two_axes", lambda plan: False)
    its.regular()
    assert looked == looks


@pytest.mark.parametrize("faster", [1, None])
def test_of_two_axes_and_one_the_faster_is_kept(
    monkeypatch: pytest.MonkeyPatch, faster: int | None
) -> None:
    real = Judge.look

    def look(judge: Judge, decisions: Decisions, *, axes: int | None = None) -> Outcome:
        outcome = real(judge, decisions, axes=axes)
        if axes == faster:
            outcome = replace(outcome, step_s={"simulated": outcome.predicted_s / 2})
        looked.append((decisions, axes, outcome))
        return outcome

    looked: list[tuple[Decisions, int | None, Outcome]] = []
    judge = _judge()
    monkeypatch.setattr(Judge, "look", look)
    monkeypatch.setattr(seeding, "_two_axes", lambda plan: True)
    its = _seeding(judge, [])
    its.regular()
    assert {axes for _, axes, _ in looked} == {1, None}
    for decisions, axes, outcome in looked:
        assert (its.known[decisions] is outcome) == (axes == faster)


def test_no_plan_is_drafted_when_time_is_over() -> None:
    assert regular_plans(_judge().drafter, deadline=0.0) == []
