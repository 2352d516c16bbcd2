"""Searches are compared on the same plans and at the same number of measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypar.mesh.calibration import table_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.measure import Measured, StageSeconds
from release import study
from release._own_cache import own_cache


class Watch:
    """A plan takes as long as it has microbatches."""

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        return Measured(0.01 * plan.microbatches + 1e-3 * len(plan.stages), 0.0, 5, 0.1)

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        return [self.measure(plan, seconds=seconds) for plan in plans]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_proposals_without_a_model_are_run_one_by_one(sampler: str) -> None:
    found = study.by_proposals("mlp", Watch(), 6, 1, sampler=sampler)
    assert len(found.path) == 6
    assert found.path == sorted(found.path, reverse=True)
    chosen = Watch().measure(found.plan, seconds=1.0)
    assert chosen.step_s == found.path[-1]
    again = study.by_proposals("mlp", Watch(), 6, 1, sampler=sampler)
    assert again.path == found.path


@pytest.mark.thorough  # 64 trials of one benchmark
def test_the_study_keeps_to_its_budget() -> None:
    with own_cache(table_calibration(Cluster.local(2))):
        found = study.by_study("mlp", Watch(), 3, 0, seeded=False)
    assert 1 <= len(found.path) <= 3


def test_the_fastest_are_told_apart_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = study.Book(tmp_path / "study.json")
    counting = study.Counting(Watch())
    study.by_proposals("mlp", counting, 3, 1, sampler="random")
    table = book.table("mlp")
    plans = {study.identity(plan): plan for plan, _ in counting.ran}
    fast, near, slow = plans.values()
    for plan, step_s in ((fast, 1.0), (near, 1.2), (slow, 1.3)):
        table.put(study.Row("search", plan, Measured(step_s, 0.0, 5, 0.1), 0.0))
    table.write()
    book.of("mlp")["searches"]["study 0"] = {"plan": study.identity(fast)}
    asked: list[Plan] = []

    answers: list[Measured | Exception] = []

    class Later(Watch):
        def measure_together(
            self, plans: list[Plan], *, seconds: float
        ) -> list[Measured | Exception]:
            asked.extend(plans)
            return answers

    monkeypatch.setattr(study, "measurer", lambda name, rounds: Later())
    # The machine is twice as slow, and what looked faster was not.
    stage = StageSeconds(0.4, 0.8, 0.2)
    answers += [Measured(2.4, 0.0, 5, 0.1, (stage,)), Measured(2.0, 0.0, 5, 0.1)]
    study.settle("mlp", book, 12)
    assert [study.identity(p) for p in asked] == [study.identity(p) for p in (fast, near)]
    drift = (2.4 / 1.0 + 2.0 / 1.2) / 2
    rows = list(book.table("mlp").rows.values())
    told = [row.measured.step_s for row in rows]
    assert told == pytest.approx([2.4 / drift, 2.0 / drift, 1.3])
    assert rows[0].measured.stages[0].backward_s == pytest.approx(0.8 / drift)
    assert book.of("mlp")["searches"] == {}
    answers[:] = [Measured(1.0, 0.0, 5, 0.1), RuntimeError("gone")]
    study.settle("mlp", book, 12)
    assert book.table("mlp").rows[study.identity(near)].measured.step_s == pytest.approx(told[1])


def test_medians_and_measurements_needed(tmp_path: Path) -> None:
    def row(plan: str, path: list[float]) -> study.Figures:
        return {"plan": plan, "path": path}

    model: study.Figures = {
        "final": {"a": 1.0, "b": 1.2},
        "searches": {
            "study 0": row("a", [1.1, 1.0]),
            "unseeded 0": row("b", [1.3, 1.2]),
            "random 0": row("b", [1.2]),
            "tpe 0": row("b", [1.5, 1.3, 1.2, 1.2]),
            "alpa": row("b", [1.2]),
        },
    }
    missed = study.summary("x", model)
    assert missed == ["x: without seeds 1.200"]
    assert model["half"] == {"study": 1, "tpe": 4}
    model["final"]["a"] = 1.3
    assert len(study.summary("x", model)) == 3
