"""What goes wrong around a search: journals, measurers, executors, interrupts."""

from __future__ import annotations

import os
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

import raypar as rp
from raypar.errors import CaptureError, ConfigError, PlanError, TrainingError
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.interop.workbench import Workbench
from raypar.search.measure import Measured
from raypar.search.plan import Found, search
from raypar.search.record import TrialRecord
from raypar.search.study.judge import Judge
from raypar.search.study.proposals import Proposals
from raypar.testing import models


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


SOME: dict[str, Any] = {"trials": 24, "seeds": ("alpa",)}


def fresh() -> OpGraph:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


@cache
def graph() -> OpGraph:
    return fresh()


def find(options: dict[str, Any], **given: Any) -> Found:
    usual: dict[str, Any] = {"planner": "optuna", "trials": 8, "seeds": ()}
    config = SearchConfig(**usual | options)
    return search(graph(), rp.Cluster.local(2), config, **given)


def studies(journal: Path) -> list[optuna.Study]:
    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = [s.study_name for s in optuna.get_all_study_summaries(storage)]
    return [optuna.load_study(study_name=name, storage=storage) for name in names]


# -- journals ---------------------------------------------------------------------------------


def test_a_folder_is_no_journal_and_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=r"is a folder.*search\.journal"):
        find({"storage": str(tmp_path / "runs")})
    assert (tmp_path / "runs").is_dir()
    assert not list(tmp_path.glob("*.bad*"))


@pytest.mark.parametrize("text", [b'{"op_code": 0}\n', b'{"op_code": 99, "worker_id": "x"}\n'])
def test_entries_that_are_no_journal_together_are_set_aside(tmp_path: Path, text: bytes) -> None:
    journal = tmp_path / "search.journal"
    journal.write_bytes(text)
    record = find({"storage": str(journal), "trials": 2}).record
    assert any("set aside" in note for note in record.notes)
    assert (tmp_path / "search.journal.bad").read_bytes() == text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_journal_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "search.journal").touch()
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        find({"storage": str(tmp_path / "search.journal")})


def test_a_resumed_search_proposes_something_new(tmp_path: Path) -> None:
    options = {"storage": str(tmp_path / "search.journal"), "sampler": "random"}
    first, again = (find(options).record for _ in range(2))
    known = [t.decisions for t in first.trials]
    assert sum(t.decisions not in known for t in again.trials) >= 5


def test_a_journal_tells_what_it_is_about(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    find({"storage": str(journal)})
    find({"storage": str(journal), "sampler": "nsga2"})
    plain, pareto = studies(journal)
    assert plain.user_attrs["sampler"] == "tpe"
    assert plain.metric_names == ["step (s)"]
    assert pareto.metric_names == ["step (s)", "peak memory (bytes)", "devices"]
    for trial in plain.trials:
        if trial.state == TrialState.COMPLETE and "plan" in trial.user_attrs:
            assert f"× {trial.params['replicas']} replica" in trial.user_attrs["plan"]


def test_processes_on_one_journal_do_not_take_each_others_proposals(tmp_path: Path) -> None:
    config = SearchConfig(planner="optuna", seed=5, storage=str(tmp_path / "search.journal"))
    space = Judge(Workbench(graph(), rp.Cluster.local(2), config)).space
    one, other = (Proposals(config, "shared", space, parallel=False) for _ in range(2))
    plan = rp.plan(graph(), rp.Cluster.local(2), SearchConfig(stages=2, microbatches=4))
    wanted = space.suggest(optuna.trial.FixedTrial(space.parameters_of(plan)))
    taken: list[optuna.Trial] = []
    add = one.study.add_trial

    def add_while_the_other_asks(trial: optuna.trial.FrozenTrial) -> None:
        add(trial)
        taken.append(other.study.ask())

    one.study.add_trial = add_while_the_other_asks  # type: ignore[method-assign]
    asked = one.near_plan(plan, "alpa")
    assert asked.decisions == wanted
    assert [trial.number for trial in taken] != [asked.trial.number]
    assert "fixed_params" not in other.study.trials[taken[0].number].system_attrs


def test_an_interrupt_leaves_no_trial_open(tmp_path: Path) -> None:
    def stop(trial: TrialRecord, best: TrialRecord | None) -> None:
        if trial.number == 4:
            raise KeyboardInterrupt

    journal = tmp_path / "search.journal"
    assert find({"storage": str(journal)}, progress=stop).record.stopped == "interrupted"
    states = [trial.state for trial in studies(journal)[0].trials]
    assert TrialState.RUNNING not in states
    assert TrialState.FAIL in states


# -- measurers --------------------------------------------------------------------------------


class Odd:
    """A measurer that answers as it is told: a number, or an error."""

    def __init__(self, answer: Any, together: Any = None) -> None:
        self.answer = answer
        self.together = together
        self.calls = 0

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        self.calls += 1
        answer = self.answer(plan)
        if isinstance(answer, BaseException):
            raise answer
        return Measured(answer, 0.01, 5, 0.1)

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        assert self.together is not None, "was not to be asked"
        return [
            a if isinstance(a, Exception) else Measured(a, 0.01, 5, 0.1)
            for a in map(self.together, plans)
        ]

    def close(self) -> None:
        pass


def what_runs(plan: Plan) -> object:
    """Equal for plans that do the same, if they have one microbatch on one stage."""
    parts = [(s.first, s.last, s.mesh, s.memory, sorted(s.sharding.items())) for s in plan.stages]
    return plan.microbatches, parts


@pytest.mark.parametrize(
    ("wrong", "model"),
    [
        pytest.param(wrong, model, marks=[pytest.mark.thorough] * (model != first))
        for wrong, first in (
            (0.0, "auto"),
            (float("nan"), "auto"),
            (float("inf"), "analytic"),
            (-1.0, "auto"),
            (RuntimeError("a bug"), "analytic"),
        )
        for model in ("auto", "analytic")
    ],
)
def test_a_senseless_measurement_is_no_measurement(wrong: Any, model: str) -> None:
    ran: list[Plan] = []

    def answer(plan: Plan) -> Any:
        ran.append(plan)
        return wrong if len(ran) == 1 else plan.predicted["step_s"]

    measurer = Odd(answer, lambda plan: plan.predicted["step_s"])
    plan, record = find(SOME | {"measure": 4, "cost_model": model}, measurer=measurer)
    (note,) = (note for note in record.notes if "did not run" in note)
    assert in_words(ran[0]) in note
    assert what_runs(plan) != what_runs(ran[0])
    if isinstance(wrong, Exception):
        assert "RuntimeError: a bug" in note


def test_a_plan_that_did_not_run_is_not_chosen_though_nothing_else_was_measured() -> None:
    ran: list[Plan] = []

    def fail(plan: Plan) -> Exception:
        ran.append(plan)
        return TrainingError("it is broken")

    plan, record = find(SOME | {"measure": 1}, measurer=Odd(fail))
    assert any("it is broken" in note for note in record.notes)
    assert what_runs(plan) not in map(what_runs, ran)


def test_where_no_plan_runs_the_reason_is_told() -> None:
    with pytest.raises(PlanError, match="it is broken"):
        find({"measure": 99}, measurer=Odd(lambda plan: TrainingError("it is broken")))


def test_finalists_that_fail_together_leave_what_ran_alone() -> None:
    measurer = Odd(lambda plan: plan.predicted["step_s"], lambda plan: float("nan"))
    record = find(SOME | {"measure": 6}, measurer=measurer).record
    assert "measured" in record.trials[record.winner].step_s


def test_finalists_run_again_only_where_there_is_time() -> None:
    measurer = Odd(lambda plan: 30.0, None)  # one second or more for each of them
    find({"measure": 6, "budget_s": 30.0}, measurer=measurer)
    assert measurer.calls


# -- executors --------------------------------------------------------------------------------


def test_side_by_side_the_same_seed_finds_the_same_plan() -> None:
    found = []
    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            found.append(find({"trials": 10}, executor=pool, capture=fresh))
    decisions = [[t.decisions for t in one.record.trials] for one in found]
    assert decisions[0] == decisions[1]
    assert found[0].plan == found[1].plan


class Lossy(Executor):
    """Answers every second call with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.calls = 0
        self.pending: list[Future[Any]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        future: Future[Any] = Future()
        if self.calls % 2:
            future.set_exception(self.error)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_a_lost_task_is_a_failed_proposal() -> None:
    lossy = Lossy(TrainingError("a task was lost: its node died"))
    record = find({}, executor=lossy, capture=fresh).record
    assert {t.state for t in record.trials} >= {"failed", "kept"}
    assert any("its node died" in t.reason for t in record.trials)


def broken() -> OpGraph:
    raise CaptureError("there is no such file here")


def test_errors_of_the_capture_come_out_as_they_are() -> None:
    with ThreadPoolExecutor(2) as pool, pytest.raises(CaptureError, match="no such file"):
        find({"seed": 7}, executor=pool, capture=broken)


def test_an_executor_that_is_shut_down_is_told() -> None:
    from concurrent.futures import CancelledError

    with pytest.raises(ConfigError, match="executor"):
        find({}, executor=Lossy(CancelledError()), capture=fresh)


def test_an_interrupt_cancels_what_nobody_waits_for() -> None:
    class Stuck(Executor):
        futures: list[Future[Any]] = []  # noqa: RUF012

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if len(self.futures) < 2:
                future.set_result(fn(*args, **kwargs))
            elif len(self.futures) == 2:
                future.set_exception(KeyboardInterrupt())
            self.futures.append(future)
            return future

    stuck = Stuck()
    record = find({}, executor=stuck, capture=fresh).record
    assert record.stopped == "interrupted"
    assert all(future.done() for future in stuck.futures)


# -- seeds ------------------------------------------------------------------------------------


def test_the_study_is_no_seed_of_itself() -> None:
    with pytest.raises(ConfigError, match=r"search\.seeds"):
        find({"seeds": ("optuna",)})


def test_a_seed_without_a_plan_is_a_note() -> None:
    record = find({"seeds": ("manual",)}).record
    assert any("planner manual" in note for note in record.notes)


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_one_trial_after_a_seed_is_a_search(sampler: str) -> None:
    record = find({"trials": 1, "seeds": ("alpa",), "sampler": sampler}).record
    assert record.proposer in ("alpa", "near alpa")
