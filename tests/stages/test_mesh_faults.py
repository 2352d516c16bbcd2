"""What goes wrong on a mesh ends on all of its ranks, soon, and leaves nothing behind."""

from __future__ import annotations

import threading
import time
from functools import cache, partial
from typing import Any

import pytest
import torch

import raypar as rp
from raypar.errors import CommTimeoutError, NonFiniteError, TrainingError
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.interpreter import RankRunner
from raypar.stages.local import LocalRun
from raypar.stages.recipe import Recipe
from raypar.stages.run import StepResult
from raypar.stages.spec import RankSpec
from raypar.stages.worker import RunnerFactory
from raypar.testing import models, random_plan, random_sharding
from raypar.testing.backends import RepeatFeed
from raypar.testing.equivalence import default_optimizer


@cache
def _model() -> tuple[Any, rp.OpGraph, Plan]:
    """The perceptron on two stages of unlike meshes, (2) and (2, 2), its parameters cut."""
    case = models.case("mlp")
    batch = case.batch(0, 8)
    graph = rp.capture(case.model_fn, batch, case.loss_fn, case.batch_dims)
    plan = random_plan(graph, rp.Cluster.local(2), seed=2, stages=2, replicas=1, microbatches=2)
    plan = random_sharding(
        graph, plan, rp.Cluster.local(8), seed=5, meshes=[(2,), (2, 2)], share=1.0, zero=[3]
    )
    assert len({s.mesh.shape for s in plan.stages}) == 2
    return batch, graph, plan


def _specs(seed: int = 0, clip_norm: float | None = None) -> list[RankSpec]:
    _, graph, plan = _model()
    recipe = Recipe(clip_norm=clip_norm)
    return compile_plan(graph, plan, optimizer=default_optimizer, seed=seed, recipe=recipe)


def _run(
    batch: Any = None,
    *,
    runner: RunnerFactory | None = None,
    timeout_s: float = 20.0,
    seed: int = 0,
) -> LocalRun:
    tensors = list(_model()[0] if batch is None else batch)
    feed = partial(RepeatFeed, tensors=tensors)
    return LocalRun(_specs(seed), feed=feed, runner=runner, timeout_s=timeout_s)


class _Fails(RankRunner):
    """The interpreter, one rank of which fails or sleeps in a chosen collective of a step."""

    def __init__(self, spec: RankSpec, world: Any, how: str, rank: int) -> None:
        super().__init__(spec, world)
        if spec.rank == rank:
            mesh, whole = self._mesh, self._mesh.collective

            def collective(*args: Any) -> torch.Tensor:
                if self._step == 1 and how == "raise":
                    raise ValueError("out of memory, say")
                if self._step == 1 and how == "sleep":
                    time.sleep(2.0)
                return whole(*args)

            mesh.collective = collective  # type: ignore[assignment, method-assign]


def _settled(before: int) -> bool:
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    return threading.active_count() <= before


@pytest.mark.parametrize("rank", [0, 3, 5])
def test_a_rank_that_fails_within_a_collective_ends_all(rank: int) -> None:
    before = threading.active_count()
    done: list[int] = []
    with (
        _run(runner=partial(_Fails, how="raise", rank=rank)) as run,
        pytest.raises(TrainingError, match="raised ValueError in step 1: out of memory"),
    ):
        run.train(0, 4, lambda r: done.append(r.step))
    assert done == [0]
    assert _settled(before)


def test_a_rank_that_does_not_come_to_a_collective_is_waited_for_until_the_deadline() -> None:
    before = threading.active_count()
    with (
        _run(runner=partial(_Fails, how="sleep", rank=1), timeout_s=0.5) as run,
        pytest.raises(CommTimeoutError, match="where the ranks stood"),
    ):
        run.train(0, 4)
    assert _settled(before)


def test_a_step_that_is_not_finite_is_applied_on_no_rank() -> None:
    batch, _, _ = _model()
    spoilt = [t.clone() for t in batch]
    spoilt[0][-1, 0] = float("nan")
    with _run(spoilt) as run:
        torch.manual_seed(0)
        fresh = models.case("mlp").model_fn().state_dict()
        seen: list[StepResult] = []
        with pytest.raises(NonFiniteError, match="step 0"):
            run.train(0, 3, seen.append)
        assert [r.applied for r in seen] == [False]
        state = run.state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in fresh)


def test_runs_side_by_side_and_after_an_aborted_one_do_not_touch_each_other() -> None:
    def losses(seed: int) -> list[float]:
        found: list[float] = []
        with _run(seed=seed) as run:
            run.train(0, 3, lambda r: found.append(float(r.loss or 0.0)))
        return found

    alone = {seed: losses(seed) for seed in (0, 1)}
    assert alone[0] != alone[1]
    with _run(runner=partial(_Fails, how="raise", rank=2)) as run, pytest.raises(TrainingError):
        run.train(0, 4)
    together: dict[int, list[float]] = {}
    threads = [
        threading.Thread(target=lambda s=seed: together.update({s: losses(s)})) for seed in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == {s: pytest.approx(found, rel=1e-12) for s, found in alone.items()}
