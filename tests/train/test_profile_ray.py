"""A search whose parts run on Ray: stages alone in warm processes, proposals as tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import ray
import torch

import raypar as rp
from raypar.errors import RayparError
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan
from raypar.mesh.devices import DEVICES
from raypar.search.config import SearchConfig
from raypar.search.cost.base import stage_code
from raypar.search.cost.stage_job import StageJob, job_of
from raypar.search.interop.workbench import Workbench
from raypar.search.plan import search
from raypar.search.study.judge import Judge
from raypar.testing import models
from raypar.train.executor import RayExecutor
from raypar.train.measure import RayMeasurer
from tests.train import test_profile_ray

CLUSTER = rp.Cluster.local(2)
CPU = DEVICES["CPU"]
adam = partial(torch.optim.AdamW, lr=0.01)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPAR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _by_value(ray_session: str) -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(test_profile_ray)
    yield
    ray.cloudpickle.unregister_pickle_by_value(test_profile_ray)


def capture() -> OpGraph:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn, case.batch_dims)


@cache
def graph() -> OpGraph:
    return capture()


def job(index: int) -> StageJob:
    options = SearchConfig(planner="uniform", stages=2, replicas=1, microbatches=2)
    plan = rp.plan(graph(), CLUSTER, options)
    return job_of(stage_code(lower_plan(graph(), plan), plan, index))


@pytest.fixture(scope="module")
def measurer(ray_session: str) -> Iterator[RayMeasurer]:
    """Its two processes have started."""
    with RayMeasurer(graph(), CLUSTER, models.case("mlp").batch(0, 8), adam) as made:
        made._pool._open(range(2))
        yield made


def pids(measurer: RayMeasurer) -> dict[int, int]:
    return {device: process.at.pid for device, process in measurer._pool._processes.items()}


def test_stages_run_alone_in_warm_processes(measurer: RayMeasurer) -> None:
    assert measurer.lacks(CPU) == ""
    before = pids(measurer)
    for index in (0, 1):
        found = measurer.profile_stage(job(index), CPU, index)
        assert min(found.seconds[:2]) > 0
        assert found.working_bytes > 0
        assert found.took_s > sum(found.seconds)
    assert pids(measurer) == before


@pytest.mark.thorough  # test_measure_ray shows it of plans, in the same pool
def test_warm_processes_outlive_a_stage_that_fails(measurer: RayMeasurer) -> None:
    before = pids(measurer)
    broken = replace(job(1), wire={"nodes": [("call", "x", "os.system", [], {}, None)]})
    with pytest.raises(RayparError):
        measurer.profile_stage(broken, CPU, 1)
    assert measurer.profile_stage(job(1), CPU, 1).seconds[0] > 0
    assert pids(measurer) == before
    ray.kill(measurer._pool._processes[1].actor)
    assert measurer.profile_stage(job(1), CPU, 1).seconds[0] > 0  # in a new process
    assert pids(measurer)[0] == before[0] != pids(measurer)[1]


@pytest.mark.thorough  # side by side is test_study, Ray tasks are test_executor_ray
def test_proposals_looked_at_in_ray_tasks_are_what_this_process_makes_of_them() -> None:
    config = SearchConfig(planner="optuna", trials=8, seeds=())
    alone = search(graph(), CLUSTER, config)
    with RayExecutor(max_workers=2) as executor:
        found = search(graph(), CLUSTER, config, executor=executor, capture=capture)
    assert len(found.record.trials) == 8
    assert not [t for t in found.record.trials if t.state == "failed"]
    # Plans come back whole: simulated here, they take what they took there.
    judge = Judge(Workbench(graph(), CLUSTER, config))
    winner = found.record.trials[found.record.winner]
    assert judge.play(found.plan).step_s["simulated"] == winner.step_s["simulated"]
    assert winner.step_s["simulated"] == min(
        t.step_s["simulated"] for t in found.record.trials if t.state == "kept"
    )
    # The first proposals are equal, whoever looks at them.
    known = {repr(t.decisions): t.step_s for t in alone.record.trials if t.state == "kept"}
    both = [t for t in found.record.trials if repr(t.decisions) in known and t.state == "kept"]
    assert both
    assert all(t.step_s == known[repr(t.decisions)] for t in both)
