"""The grid that a search is held to, and measurements as a file."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import raypar
from raypar.errors import RayparError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.schedules.registry import schedule_names
from raypar.search.measure import Measured, StageSeconds
from release import regret
from release._plan_grid import DEVICES, LEAST_RANDOM, grid, identity
from release._replay import ReplayMeasurer, Row, Table
from release.regret import Timed, measure_grid, measure_pairs, met, own_rows

MEASURED = Measured(0.1, 0.02, 7, 2.0, (StageSeconds(0.01, 0.02, 0.001),), 12345, 0.01)


@functools.cache
def graph() -> OpGraph:
    def model() -> nn.Module:
        layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.ReLU())]
        return nn.Sequential(*layers)

    batch = (torch.zeros(16, 8), torch.zeros(16, dtype=torch.int64))
    return raypar.capture(model, batch, nn.functional.cross_entropy)


@functools.cache
def plans() -> list[tuple[str, Plan]]:
    return grid(graph())


class Fake:
    """Every plan takes as many milliseconds as it has stages."""

    def __init__(self) -> None:
        self.ran = 0
        self.fails = False

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        self.ran += 1
        if self.fails:
            raise RayparError("no memory")
        return replace(MEASURED, step_s=len(plan.stages) / 1e3)

    def measure_together(
        self, plans: list[Plan], *, seconds: float, on_turn: Any = None
    ) -> list[Measured | Exception]:
        return [self.measure(plan, seconds=seconds) for plan in plans]

    def close(self) -> None:
        pass

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_grid_has_many_different_plans_that_fit() -> None:
    origins = Counter(origin for origin, _ in plans())
    assert len(plans()) >= 60
    assert origins["random"] >= LEAST_RANDOM > 20
    assert len({identity(plan) for _, plan in plans()}) == len(plans())
    for _, plan in plans():
        check_plan(plan, graph(), raypar.Cluster.local(DEVICES))
    shapes = {(len(p.stages), p.replicas, p.stages[0].mesh.inner != ()) for _, p in plans()}
    assert {(1, 1, False), (2, 1, False), (1, 2, False), (1, 1, True), (4, 1, False)} <= shapes
    names = {p.schedule.name for _, p in plans()}
    assert names == set(schedule_names())


def test_plans_are_known_by_what_they_do() -> None:
    plan = next(p for _, p in plans() if len(p.stages) == 2)
    swapped = replace(
        plan,
        stages=tuple(
            replace(s, mesh=replace(s.mesh, devices=tuple(1 - d for d in s.mesh.devices)))
            for s in plan.stages
        ),
        predicted={"step_s": 3.0},
        planner="another",
    )
    assert identity(swapped) == identity(plan)
    assert identity(replace(plan, microbatches=16)) != identity(plan)


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = Table(tmp_path / "grid" / "model.json")
    table.write()
    assert Table(table.path).rows == {}
    for origin, plan in plans()[:3]:
        table.put(Row(origin, plan, MEASURED, 1.5))
    table.write()
    again = Table(table.path)
    assert list(again.rows) == list(table.rows)
    row = again.get(plans()[1][1])
    assert row is not None
    assert (row.measured, row.load, row.origin) == (MEASURED, 1.5, plans()[1][0])


def test_a_replay_runs_only_what_is_not_in_the_table(tmp_path: Path) -> None:
    table, inner = Table(tmp_path / "model.json"), Fake()
    known, unknown = plans()[0][1], plans()[1][1]
    table.put(Row("uniform", known, MEASURED, 1.5))
    replay = ReplayMeasurer(table)
    assert replay.measure(known, seconds=1) == MEASURED
    found = replay.measure_together([known, unknown], seconds=1)
    assert found[0] == MEASURED
    assert "not in model.json" in str(found[1])
    replay = ReplayMeasurer(table, inner)
    assert replay.measure(unknown, seconds=1) == replay.measure(unknown, seconds=1)
    assert (inner.ran, replay.missed) == (1, 1)
    assert [row.origin for row in own_rows(table)] == ["uniform"]


def test_disturbed_rows_are_measured_anew_and_the_choice_is_held_to_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Fake()
    monkeypatch.setattr(regret, "captured", lambda name: graph())
    monkeypatch.setattr(regret, "grid", lambda _: plans())
    monkeypatch.setattr(regret, "measurer", lambda *_: runs)
    book = regret.Book(tmp_path / "regret.json")
    measure_grid("m", book, slice(0, 4), 1.0)
    table = book.table("m")
    noisy = next(iter(table.rows.values()))
    table.put(replace(noisy, measured=replace(noisy.measured, disturbed=0.5)))
    table.write()
    measure_grid("m", book, slice(2, 8), 1.0)
    measure_grid("m", book, slice(0, 8), 1.0)
    assert runs.ran == 4 + 4 + 1
    model = book.of("m")
    assert (model["grid"]["measured"], model["grid"]["disturbed"]) == (8, 0)
    chosen = next(p for _, p in plans() if len(p.stages) == 2)
    model["choice"] = {"plan": json.loads(chosen.to_json())}
    measure_pairs("m", book, 10, 1.0)
    assert model["ratio"] == 2.0
    model["measuring"] = 0.1
    assert not met(model)
    model["ratio"] = 1.03
    assert met(model)
    assert "choice: 2 stages" in capsys.readouterr().out


def test_time_spent_measuring_counts_also_where_a_plan_fails() -> None:
    inner = Fake()
    timed = Timed(inner)
    timed.measure_together([plans()[0][1]] * 2, seconds=1)
    before = timed.seconds
    inner.fails = True
    with pytest.raises(RayparError):
        timed.measure(plans()[0][1], seconds=1)
    assert timed.seconds > before > 0
    assert timed.plans == 3
