"""Stages run alone before whole steps do: order of fidelities, pruning, what is kept, failures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

import raypar as rp
from raypar.errors import ConfigError, TrainingError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import DEVICES, DeviceKind
from raypar.mesh.local_gpus import gpu_kind
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.cost.rows import ALONE
from raypar.search.cost.stage_job import StageJob
from raypar.search.cost.store import MeasurementStore
from raypar.search.measure import Measured, ProfiledStage
from raypar.search.plan import Found, search
from raypar.search.profiler import LocalProfiler
from raypar.search.record import FIDELITIES, SearchRecord, TrialRecord
from raypar.testing import models

CLUSTER = Cluster.local(2)
Seconds = tuple[float, float, float, float]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


@cache
def graph() -> OpGraph:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


def calls(job: StageJob) -> int:
    return sum(node[0] == "call" for node in job.wire["nodes"])


def even(job: StageJob) -> Seconds:
    """Every op takes as long."""
    forward = 1e-5 * calls(job)
    return forward, 2 * forward, forward, forward


class Device:
    """Profiles as it is told, and remembers what it was asked."""

    def __init__(
        self,
        seconds: Callable[[StageJob], Any] = even,
        lacks: str = "",
        working_bytes: Callable[[StageJob], int] = lambda job: 0,
    ) -> None:
        self.seconds = seconds
        self.missing = lacks
        self.working_bytes = working_bytes
        self.jobs: list[StageJob] = []
        self.events: list[str] = []

    def lacks(self, kind: DeviceKind) -> str:
        return self.missing

    def profile_stage(self, job: StageJob, kind: DeviceKind, device: int) -> ProfiledStage:
        assert CLUSTER.node_of(device).device == kind
        self.jobs.append(job)
        self.events.append("stage")
        answer = self.seconds(job)
        if isinstance(answer, BaseException):
            raise answer
        return ProfiledStage(answer, self.working_bytes(job), 0.25)


class Runs(Device):
    """Runs whole plans as well."""

    def __init__(self, seconds: Callable[[StageJob], Any] = even) -> None:
        super().__init__(seconds)
        self.ran: list[Plan] = []

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        self.events.append("steps")
        self.ran.append(plan)
        return Measured(1.2 * plan.predicted["step_s"], 0.01, 5, 0.5)

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        self.events.append("finals")
        return [Measured(1.2 * plan.predicted["step_s"], 0.01, 9, 0.5) for plan in plans]

    def close(self) -> None:
        pass


def find(options: dict[str, Any] | None = None, cluster: Cluster = CLUSTER, **given: Any) -> Found:
    usual: dict[str, Any] = {"planner": "optuna", "trials": 16, "seeds": ()}
    return search(graph(), cluster, SearchConfig(**usual | (options or {})), **given)


def profiled(record: SearchRecord) -> list[TrialRecord]:
    return [t for t in record.trials if "profiled" in t.step_s]


def test_fidelities_come_in_order_and_all_are_told() -> None:
    runs = Runs()
    found = find({"measure": 4, "profile": 3}, measurer=runs, profiler=runs)
    assert FIDELITIES == ("quick", "simulated", "learned", "profiled", "measured")
    assert runs.events[0] == "stage"  # nothing runs before its stage did
    assert 1 <= runs.events.count("stage") == len(profiled(found.record)) <= 3
    assert "steps" in runs.events[runs.events.index("stage") :]
    both = [t for t in profiled(found.record) if "measured" in t.step_s]
    assert both
    for trial in both:
        assert trial.best_s == trial.step_s["measured"]
        assert trial.profile.startswith("stage ")
        assert "were predicted" in trial.profile
        assert trial.measured_s >= 0.75
    assert found.record.measured_s >= 0.25 * len(runs.jobs) + 0.5 * len(runs.ran)
    assert SearchRecord.from_json(found.record.to_json()) == found.record


def test_what_is_profiled_is_kept_and_changes_what_is_predicted() -> None:
    slow = Device(lambda job: tuple(40 * s for s in even(job)))
    record = find({"profile": 3}, profiler=slow).record
    rows = MeasurementStore.for_cluster(CLUSTER).stages
    assert len(rows) == len(slow.jobs) > 0
    assert all(row.where == ALONE and row.origin == graph().params_hash for row in rows)
    assert {row.seconds[0] for row in rows} == {slow.seconds(job)[0] for job in slow.jobs}
    for trial in profiled(record):
        assert trial.step_s["profiled"] > 1.1 * trial.step_s["simulated"]
    # The winner is not one that was spared the bad news.
    winner = record.trials[record.winner]
    assert "profiled" in winner.step_s or "learned" in winner.step_s


def test_a_plan_that_falls_behind_is_pruned_before_it_runs() -> None:
    """Alone, stages of plans that leave their ops whole turn out to be far too slow."""

    def seconds(job: StageJob) -> Seconds:
        wide = any(size > 1 for name, size in job.axes if name != "data")
        return even(job) if wide else (0.2, 0.4, 0.2, 0.2)

    before = find({"trials": 40}).record
    assert not any(t.decisions.get("tensor", 1) != 1 for t in before.trials[before.winner :][:1])
    runs = Runs(seconds)
    found = find({"trials": 40, "measure": 6, "profile": 30}, measurer=runs, profiler=runs)
    pruned = [t for t in profiled(found.record) if t.state == "pruned"]
    assert pruned
    for trial in pruned:
        assert "profiled" in trial.reason
        assert "measured" not in trial.step_s
        assert trial.number != found.record.winner


def test_equal_measurements_equal_decisions(tmp_path: Path, monkeypatch: Any) -> None:
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / name))
        found.append(find({"profile": 4}, profiler=Device()))
    assert found[0].plan == found[1].plan
    assert [t.decisions for t in found[0].record.trials] == [
        t.decisions for t in found[1].record.trials
    ]
    assert [t.profile for t in found[0].record.trials] == [
        t.profile for t in found[1].record.trials
    ]


def test_a_stage_is_profiled_once_for_all_searches() -> None:
    first, again = Device(), Device()
    find({"profile": 99}, profiler=first)
    record = find({"profile": 99}, profiler=again).record
    rows = MeasurementStore.for_cluster(CLUSTER).stages
    assert len({row.work.works for row in rows}) == len(first.jobs) + len(again.jobs)
    assert any(t.profile == "all its stages were profiled before" for t in record.trials)


@pytest.mark.parametrize(
    "wrong",
    [
        TrainingError("out of memory"),
        RuntimeError("a bug"),
        (0.0, 0.0, 0.0, 0.0),
        (float("nan"), 1.0, 1.0, 1.0),
        (-1.0, 1.0, 1.0, 1.0),
    ],
)
def test_a_profiler_that_fails_ends_no_search(wrong: Any) -> None:
    device = Device(lambda job: wrong)
    plain = find()
    found = find({"profile": 2}, profiler=device)
    assert len(device.jobs) == 2
    assert found.plan.stages == plain.plan.stages
    assert any("could not be profiled" in note for note in found.record.notes)
    assert any("failed" in t.profile for t in found.record.trials)
    assert not profiled(found.record)
    assert not MeasurementStore.for_cluster(CLUSTER).stages


def test_an_interrupt_while_profiling_gives_the_best_so_far() -> None:
    found = find({"profile": 2}, profiler=Device(lambda job: KeyboardInterrupt()))
    assert found.record.stopped == "interrupted"


def test_memory_that_is_seen_to_be_more_takes_plans_out() -> None:
    limit = min(CLUSTER.memory(d) for d in range(2))
    tight: dict[str, Any] = {}
    for _ in range(2):  # the second is the best of what is nearly as lean as can be
        peak = find(tight).plan.predicted["peak_bytes"]
        tight = {"memory_fraction": 1.05 * peak / limit}
    device = Device(working_bytes=lambda job: 1 << 40)
    record = find({**tight, "profile": 2}, profiler=device).record
    taken = [t for t in profiled(record) if t.state == "infeasible"]
    assert taken
    assert all("by what was measured" in t.reason and t.overfull > 1.0 for t in taken)
    assert all(row.working_bytes == 1 << 40 for row in MeasurementStore.for_cluster(CLUSTER).stages)


# -- devices that are not here -----------------------------------------------------------------


def test_devices_that_are_not_here_are_skipped_and_told(tmp_path: Path) -> None:
    journal = tmp_path / "search.journal"
    device = Device(lacks="no H100 is here: this machine has a CPU")
    found = find({"profile": 4, "storage": str(journal)}, profiler=device)
    assert not device.jobs
    assert not any("H100" in note for note in found.record.notes)
    told = [t for t in found.record.trials if t.profile]
    assert told
    assert all(t.profile == "skipped: no H100 is here: this machine has a CPU" for t in told)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name=None, storage=storage)
    assert any("H100" in t.user_attrs.get("profile", "") for t in study.trials)
    assert found.plan.stages == find({}).plan.stages


def test_this_machine_profiles_for_a_cluster_of_its_kind() -> None:
    """The plan needs 64 devices; the programs of its stages really run, on one."""
    cluster = Cluster.virtual(8, 8, "CPU")
    record = find({"profile": 1, "trials": 6}, cluster).record
    (trial,) = profiled(record)
    (row,) = MeasurementStore.for_cluster(cluster).stages
    assert min(row.seconds[:2]) > 0
    assert row.working_bytes > 0
    assert 0.8 < row.working_bytes / row.counted_bytes < 1.2
    assert trial.devices > 1
    assert not record.notes


def test_a_virtual_cluster_of_others_is_planned_without() -> None:
    if not LocalProfiler().lacks(DEVICES["H100"]):
        pytest.skip("this machine has an H100")
    cluster = Cluster.virtual(1, 2, "H100")
    record = find({"profile": 2, "trials": 6}, cluster).record
    assert not profiled(record)
    assert any("no H100 is here" in t.profile for t in record.trials)


def test_kinds_of_devices_are_told_apart() -> None:
    local = LocalProfiler()
    assert local.lacks(DEVICES["CPU"]) == ""
    assert "CPU@0.5" in local.lacks(DEVICES["CPU"].at_speed(0.5))
    assert gpu_kind("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert gpu_kind("NVIDIA A100-SXM4-40GB") is DEVICES["A100-40"]
    assert gpu_kind("NVIDIA A100-SXM4-80GB") is DEVICES["A100-80"]
    assert gpu_kind("NVIDIA H100 PCIe") is None  # slower than what the table calls H100
    assert gpu_kind("Something else") is None


# -- options ------------------------------------------------------------------------------------


def test_nothing_is_profiled_unless_asked_or_given() -> None:
    device = Device()
    assert not profiled(find().record)
    assert not profiled(find({"profile": 0}, profiler=device).record)
    assert not profiled(find({"cost_model": "analytic"}, profiler=device).record)
    assert not device.jobs
    find({}, profiler=device)
    assert 0 < len(device.jobs) <= 8


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "some"])
def test_a_senseless_number_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"search\.profile"):
        SearchConfig(profile=wrong)


def test_a_model_that_takes_nothing_in_cannot_be_taught() -> None:
    with pytest.raises(ConfigError, match=r"search\.cost_model"):
        SearchConfig(profile=4, cost_model="analytic")
