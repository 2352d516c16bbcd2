"""The study: seeds, proposals, budgets, measurements, journals, interruptions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import raypar as rp
from raypar.errors import ConfigError, PlanError, TrainingError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration_files import load_calibration
from raypar.plan import Plan
from raypar.search.bounds.memory import usable_bytes
from raypar.search.config import SAMPLERS, SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.measure import Measured
from raypar.search.plan import search
from raypar.search.record import SearchRecord, TrialRecord
from raypar.search.study.judge import Outcome
from raypar.search.study.ledger import Ledger
from raypar.testing import models

SOME: dict[str, Any] = {"planner": "optuna", "trials": 14, "seeds": ("alpa",)}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


def fresh() -> OpGraph:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


@cache
def graph() -> OpGraph:
    return fresh()


def test_the_study_is_never_worse_than_its_seed_and_says_who_won() -> None:
    cluster = rp.Cluster.local(4)
    plan, record = search(graph(), cluster, SearchConfig(**SOME))
    seed = next(t for t in record.trials if t.proposer == "alpa")
    assert seed.best_s is not None
    assert plan.predicted["step_s"] <= seed.best_s
    assert plan.planner == "optuna"
    assert record.trials[record.winner].words == in_words(plan)
    assert record.proposer in {"alpa", "near alpa", "neighbour", "tpe"}
    assert 0 < plan.certificate["lower_bound_s"] <= plan.predicted["step_s"]
    assert len(record.trials) == 14
    assert record.stopped == "all trials were made"
    assert SearchRecord.from_json(record.to_json()) == record


def test_same_seed_and_trials_same_plan() -> None:
    cluster = rp.Cluster.local(2)
    config = SearchConfig(**SOME | {"seeds": (), "seed": 3})
    first, second = (search(fresh(), cluster, config) for _ in range(2))
    assert first.plan == second.plan
    assert [t.decisions for t in first.record.trials] == [t.decisions for t in second.record.trials]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_finds_a_plan(sampler: str) -> None:
    pytest.importorskip({"gp": "scipy", "cmaes": "cmaes"}.get(sampler, "optuna"))
    config = SearchConfig(**SOME | {"sampler": sampler, "seeds": (), "trials": 12})
    plan, record = search(graph(), rp.Cluster.local(2), config)
    assert record.sampler == sampler
    assert {t.proposer for t in record.trials} <= {sampler, "neighbour"}
    assert plan.predicted["step_s"] == min(
        t.step_s["simulated"] for t in record.trials if t.state == "kept"
    )


def test_a_missing_package_of_a_sampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cmaes", None)
    with pytest.raises(ConfigError, match=r"raypar\[samplers\]"):
        search(graph(), rp.Cluster.local(2), SearchConfig(**SOME | {"sampler": "cmaes"}))


def test_a_journal_is_resumed(tmp_path: Path) -> None:
    journal = str(tmp_path / "deep" / "search.journal")
    config = SearchConfig(**SOME | {"storage": journal, "seeds": ()})
    first = search(graph(), rp.Cluster.local(2), config)
    again = search(graph(), rp.Cluster.local(2), replace(config, trials=4))
    assert any("resumed" in note for note in again.record.notes)
    assert again.plan.predicted["step_s"] <= first.plan.predicted["step_s"]
    assert again.record.trials[0].decisions in [t.decisions for t in first.record.trials]


@pytest.mark.parametrize("text", [b"not a journal\n", b'{"op_code": 0}\n[1]\n', b"\xff\xfe\n"])
def test_a_corrupt_journal_is_set_aside(tmp_path: Path, text: bytes) -> None:
    journal = tmp_path / "search.journal"
    journal.write_bytes(text)
    config = SearchConfig(**SOME | {"storage": str(journal), "seeds": (), "trials": 4})
    record = search(graph(), rp.Cluster.local(2), config).record
    assert any("set aside" in note for note in record.notes)
    assert (tmp_path / "search.journal.bad").read_bytes() == text


def test_a_cut_last_line_of_a_journal_is_dropped(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    config = SearchConfig(**SOME | {"storage": str(journal), "seeds": (), "trials": 6})
    search(graph(), rp.Cluster.local(2), config)
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    record = search(graph(), rp.Cluster.local(2), config).record
    assert any("resumed" in note for note in record.notes)
    assert not list(tmp_path.glob("*.bad"))


def test_a_journal_in_no_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = SearchConfig(**SOME | {"storage": str(tmp_path / "file" / "search.journal")})
    with pytest.raises(ConfigError, match=r"search\.storage"):
        search(graph(), rp.Cluster.local(2), config)


def test_an_interruption_returns_the_best_so_far() -> None:
    def stop(trial: TrialRecord, best: TrialRecord | None) -> None:
        if trial.number == 5:
            raise KeyboardInterrupt

    config = SearchConfig(**SOME)
    plan, record = search(graph(), rp.Cluster.local(2), config, progress=stop)
    assert len(record.trials) == 6
    assert record.stopped == "interrupted"
    assert plan.planner == "optuna"


def test_an_interruption_before_there_is_a_plan_is_raised() -> None:
    def stop(trial: TrialRecord, best: TrialRecord | None) -> None:
        raise KeyboardInterrupt

    config = SearchConfig(**SOME | {"seeds": (), "memory_fraction": _tight()})
    with pytest.raises(KeyboardInterrupt):
        search(graph(), rp.Cluster.local(2), config, progress=stop)


def _tight() -> float:
    """A share of the memory that has room for parameters and what goes with them, and no more."""
    cluster = rp.Cluster.local(2)
    held = 4 * sum(8 * math.prod(shape) for shape, _, _ in graph().params.values())
    room = usable_bytes(cluster, load_calibration(cluster), SearchConfig(memory_fraction=1.0))
    return 1.01 * held / sum(room)


def test_what_cannot_fit_says_what_binds() -> None:
    config = SearchConfig(**SOME | {"memory_fraction": _tight(), "trials": 5})
    with pytest.raises(PlanError, match="What binds is stage"):
        search(graph(), rp.Cluster.local(2), config)


def test_a_seconds_budget_ends_a_search() -> None:
    config = SearchConfig(planner="optuna", seeds=(), budget_s=1e-6)
    with pytest.raises(PlanError, match="budget"):
        search(graph(), rp.Cluster.local(2), config)


def test_what_a_planner_of_seeds_says_is_told_where_no_time_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "raypar.search.study.seeding.seeds",
        lambda bench, *times: iter([("alpa", PlanError("it needs 9 GB of 1 GB"))]),
    )
    with pytest.raises(PlanError, match="it needs 9 GB of 1 GB"):
        search(graph(), rp.Cluster.local(2), SearchConfig(planner="optuna", budget_s=1e-6))


def test_proposals_are_looked_at_side_by_side() -> None:
    config = SearchConfig(**SOME | {"seeds": ()})
    with ThreadPoolExecutor(1) as pool:
        plan, record = search(graph(), rp.Cluster.local(2), config, executor=pool, capture=fresh)
    assert len(record.trials) == 14
    assert plan.predicted["step_s"] == min(
        t.step_s["simulated"] for t in record.trials if t.state == "kept"
    )
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="capture"):
        search(graph(), rp.Cluster.local(2), config, executor=pool)


class Stopwatch:
    """Measures as it is told: plans with a mark are fast, some do not run."""

    def __init__(self, step_s: Any, fails: Any = lambda plan: False) -> None:
        self.step_s = step_s
        self.fails = fails
        self.ran: list[Plan] = []

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        self.ran.append(plan)
        if self.fails(plan):
            raise TrainingError("it did not run")
        return Measured(self.step_s(plan), 0.01, 5, 0.5)

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        return [Measured(self.step_s(plan), 0.01, 10, 1.0) for plan in plans]

    def close(self) -> None:
        pass


def test_what_is_measured_decides() -> None:
    """Plans on as many devices as the one that is predicted best take twice as long."""
    config = SearchConfig(**SOME | {"trials": 30})
    likely = len(search(graph(), rp.Cluster.local(2), config).plan.devices)
    watch = Stopwatch(lambda p: p.predicted["step_s"] * (2.0 if len(p.devices) == likely else 1.0))
    config = replace(config, measure=10)
    plan, record = search(graph(), rp.Cluster.local(2), config, measurer=watch)
    assert len(plan.devices) != likely
    assert 2 <= len(watch.ran) <= 10
    measured = [t for t in record.trials if "measured" in t.step_s]
    assert record.winner in [t.number for t in measured]
    assert record.measured_s > 0
    texts = [replace(p, predicted={}).to_json() for p in watch.ran]
    assert len(set(texts)) == len(texts)


def test_a_sure_prediction_needs_few_measurements() -> None:
    watch = Stopwatch(lambda p: 1.1 * p.predicted["step_s"])
    config = SearchConfig(**SOME | {"trials": 30, "measure": 25})
    plan, record = search(graph(), rp.Cluster.local(2), config, measurer=watch)
    assert len(watch.ran) < 15
    best = min(t.step_s["simulated"] for t in record.trials if t.state == "kept")
    assert plan.predicted["step_s"] <= 1.02 * best


def test_plans_that_do_not_run_are_left_out() -> None:
    best = search(graph(), rp.Cluster.local(2), SearchConfig(**SOME)).plan
    words = in_words(best)
    watch = Stopwatch(lambda p: p.predicted["step_s"], lambda p: in_words(p) == words)
    config = SearchConfig(**SOME | {"measure": 4})
    plan, record = search(graph(), rp.Cluster.local(2), config, measurer=watch)
    assert in_words(plan) != words
    assert any("did not run" in note for note in record.notes)


def test_nothing_is_measured_where_that_is_asked_for() -> None:
    watch = Stopwatch(lambda p: 1.0)
    search(graph(), rp.Cluster.local(2), SearchConfig(**SOME | {"measure": 0}), measurer=watch)
    assert not watch.ran


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_runner_up_plans_lose_is_told_on_the_scale_of_the_plan() -> None:
    graph = rp.capture(lambda: torch.nn.Linear(4, 4), torch.randn(8, 4), lambda out: out.mean())
    ledger, steps = Ledger(0.0), {1: 1.0, 2: 1.1}
    for replicas, learned in steps.items():
        made = rp.plan(graph, rp.Cluster.local(2), SearchConfig(stages=1, replicas=replicas))
        made = replace(made, predicted={"step_s": learned / 2})  # a simulation says half of it
        ledger.add(
            "tpe", None, Outcome("kept", made, {"simulated": learned / 2, "learned": learned})
        )
    assert ledger.best is not None
    (lost,) = ledger.alternatives(ledger.best).values()
    assert lost == pytest.approx(0.55)  # a tenth more than 0.5
