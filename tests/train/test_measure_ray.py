"""Plans in warm processes: equal to plans started afresh, and the processes outlive every fault."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table
from torch import nn

import raypar
from raypar.comm.group import Group
from raypar.errors import RayparError, StageDiedError, TrainingError
from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.search.measure import Measured
from raypar.stages.compile import compile_plan
from raypar.stages.spec import RankSpec, StepReport
from raypar.testing.backends import start_run
from raypar.train import _warm_pool, measure
from raypar.train._warm_pool import Loaded, PoolSettings, WarmPool
from raypar.train.measure import RayMeasurer
from tests.stages import fakes
from tests.stages.fakes import FakeFactory, FakeRunner, Fault, fake_specs
from tests.train import test_measure_ray

CLUSTER = raypar.Cluster.local(2)
adam = functools.partial(torch.optim.AdamW, lr=0.01)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(8, 6, generator=g), torch.randint(0, 3, (8,), generator=g)


@functools.cache
def graph() -> OpGraph:
    return raypar.capture(model, batch(), nn.functional.cross_entropy)


def plan(stages: int = 2, replicas: int = 1, microbatches: int = 2) -> Plan:
    options = raypar.SearchConfig(
        planner="uniform", stages=stages, replicas=replicas, microbatches=microbatches
    )
    return raypar.plan(graph(), CLUSTER, options)


def specs(made: Plan) -> list[RankSpec]:
    return compile_plan(graph(), made, optimizer=adam, threads=1)


class Stuck(FakeRunner):
    """Its first step cannot be interrupted."""

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        time.sleep(60)
        return super().step(step, inputs)


def stuck(spec: RankSpec, world: Group) -> FakeRunner:
    return (Stuck if spec.rank == 1 else FakeRunner)(spec, world)


@pytest.fixture(scope="module")
def pool(ray_session: str) -> Iterator[WarmPool]:
    """One pool for all tests, which heals; its ranks may be fakes."""
    for module in (fakes, test_measure_ray):
        ray.cloudpickle.register_pickle_by_value(module)
    made = WarmPool(CLUSTER, list(batch()), PoolSettings())
    made.begin(range(2))
    yield made
    made.close()
    made.close()
    for module in (fakes, test_measure_ray):
        ray.cloudpickle.unregister_pickle_by_value(module)


def held_groups() -> list[str]:
    return [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


def losses(pool: WarmPool, loaded: Loaded, steps: int) -> list[float]:
    rows = [step.ranks for step in pool.run(loaded, steps, 60.0)]
    return [sum(r.loss for r in ranks if r.loss is not None) for ranks in rows]


def pids(loaded: Loaded) -> list[int]:
    return [process.at.pid for process in loaded.processes]


def test_nothing_of_a_plan_is_left_for_the_next(pool: WarmPool) -> None:
    expected: list[float] = []
    with start_run("local", specs(plan()), batch()) as run:
        run.train(0, 4, lambda result: expected.append(result.loss or 0.0))
    first = pool.load(specs(plan()))
    beside = pool.load(specs(plan(stages=1, replicas=2)))
    assert losses(pool, first, 2) == expected[:2]
    losses(pool, beside, 3)
    assert losses(pool, first, 2) == expected[2:]
    assert all(held.resident > 0 for held in pool.held(first))
    pool.unload(first)
    pool.unload(first)
    again = pool.load(specs(plan()))
    assert losses(pool, again, 4) == expected
    assert pids(again) == pids(first) == pids(beside)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault("build", 1, 0), TrainingError, "raised ValueError during start-up: the fake cannot"),
        (Fault("raise", 1, 1), TrainingError, "rank 1.* raised ValueError in step 1: the fake"),
        (Fault("hang", 0, 1), TrainingError, r"did not run 3 steps within 0\.7 s: .*rank 0"),
        (Fault("die", 1, 1), StageDiedError, r"lost stage 1 \(rank 1"),
    ],
)
def test_a_plan_that_fails_leaves_good_processes(
    pool: WarmPool, fault: Fault, error: type[Exception], text: str
) -> None:
    good = pool.load(fake_specs(2), FakeFactory())
    deadline_s = 0.7 if fault.kind == "hang" else 60.0
    with pytest.raises(error, match=text):
        pool.run(pool.load(fake_specs(2), FakeFactory((fault,))), 3, deadline_s)
    alive = fault.kind != "die"
    if alive:
        assert len(pool.run(good, 2, 60.0)) == 2
    else:
        with pytest.raises(StageDiedError):
            pool.run(good, 2, 60.0)
    after = pool.load(fake_specs(2), FakeFactory())
    assert len(pool.run(after, 2, 60.0)) == 2
    assert (pids(after) == pids(good)) == alive
    assert pids(after)[0] == pids(good)[0]
    pool.unload(good)
    pool.unload(after)


def test_a_process_that_cannot_be_interrupted_is_replaced(
    pool: WarmPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_warm_pool, "_HEAL_S", 0.5)
    loaded = pool.load(fake_specs(2), stuck)
    with pytest.raises(TrainingError, match=r"did not run 1 steps within 0\.5 s"):
        pool.run(loaded, 1, 0.5)
    after = pool.load(fake_specs(2), FakeFactory())
    assert pids(after)[1] != pids(loaded)[1]
    assert len(pool.run(after, 2, 60.0)) == 2


def test_a_step_that_is_not_finite_ends_the_steps(pool: WarmPool) -> None:
    loaded = pool.load(fake_specs(2), FakeFactory((Fault("nan", 1, 2),)))
    assert len(pool.run(loaded, 4, 60.0)) == 2
    assert pool.run(loaded, 4, 60.0) == []


def test_figures_of_plans_and_an_interrupt(pool: WarmPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "WarmPool", lambda *_: pool)
    with RayMeasurer(graph(), CLUSTER, batch(), adam) as measurer:
        both = measurer.measure_together([plan(), plan(stages=1, replicas=2)], seconds=0.1)
        assert [len(found.stages) for found in both if isinstance(found, Measured)] == [2, 1]
        alone = measurer.measure(plan(), seconds=0.1)
        assert alone.steps >= 5
        assert alone.took_s > alone.step_s > 0
        assert all(s.forward_s > 0 and s.backward_s > 0 and s.optimizer_s > 0 for s in alone.stages)
        # At least the values, gradients and two states of the smaller stage, in float32.
        assert alone.peak_bytes >= 16 * min(6 * 16 + 16, 16 * 3 + 3)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pool, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measurer.measure(plan(), seconds=0.1)
        assert not held_groups()
        with pytest.raises(RayparError, match="the measurer is closed"):
            measurer.measure(plan(), seconds=0.1)
