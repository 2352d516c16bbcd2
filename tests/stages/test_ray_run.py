"""A run on Ray actors: dispatch, state and every fault, with ranks without programs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from ray.util.placement_group import placement_group_table

from raypar.errors import (
    ClusterError,
    CommTimeoutError,
    NonFiniteError,
    RayparError,
    StageDiedError,
    TrainingError,
)
from raypar.stages.remote import RayRun
from raypar.stages.run import StepResult
from tests.stages import fakes
from tests.stages.fakes import FakeFactory, Fault, fake_specs


@pytest.fixture(autouse=True)
def _by_value(ray_session: str) -> Iterator[None]:
    """The fakes travel by value, and every test gives its devices back."""
    ray.cloudpickle.register_pickle_by_value(fakes)
    yield
    held = [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]
    assert not held


def run_with(*faults: Fault, world: int = 2, **options: Any) -> RayRun:
    return RayRun(fake_specs(world), runner=FakeFactory(faults), name="test", **options)


def test_steps_state_a_second_training_a_stop_and_then_the_first_error() -> None:
    got: list[StepResult] = []
    until_stop: list[int] = []
    before: list[int] = []
    far = 2_000_000  # beyond what the training that is stopped can reach
    run = run_with(Fault("raise", 1, far + 3))

    def seen(result: StepResult) -> None:
        until_stop.append(result.step)
        if result.step == 10:
            run.request_stop()

    with run:
        run.train(0, 5, got.append)
        run.train(5, 2, got.append)
        state = run.state_dict()
        gradients = run.gradients()
        # All ranks end before the same step, and training goes on.
        following = run.train(7, 1_000_000, seen)
        assert until_stop == list(range(7, following))
        assert following < 1_000_000
        assert run.call("completed_steps") == [following] * 2
        assert run.train(following, 2, horizon=following + 9) == following + 2
        # Rank 0 fails for want of rank 1: what began it is told, after the steps before it.
        with pytest.raises(
            TrainingError, match=r"rank 1 on node .* raised ValueError in step 2000003"
        ):
            run.train(far, 500, lambda r: before.append(r.step))
        assert before == [far, far + 1, far + 2]
    assert [r.step for r in got] == list(range(7))
    assert [len(r.ranks) for r in got] == [2] * 7
    assert torch.equal(state["layers.0.bias"], torch.full((2,), 7.0))
    assert torch.equal(state["again.bias"], state["layers.0.bias"])
    assert torch.equal(gradients["layers.1.bias"], torch.full((2,), 16.0))
    assert all(info.node for info in run.infos)
    with pytest.raises(RayparError, match="not started, or closed"):
        run.train(7, 1)


@pytest.mark.thorough  # the actors' reply is that of any failure
def test_a_step_that_is_not_finite_is_raised_after_the_steps_before_it() -> None:
    got: list[int] = []
    with run_with(Fault("nan", 0, 3), world=1) as run:
        with pytest.raises(NonFiniteError, match="step 3: not finite: stage 0 loss"):
            run.train(0, 500, lambda r: got.append(r.step))
        assert got == [0, 1, 2, 3]


def test_a_dead_stage_actor_is_named_with_the_others_positions() -> None:
    with (
        run_with(Fault("die", 1, 4), world=3) as run,
        pytest.raises(StageDiedError) as found,
    ):
        run.train(0, 500)
    text = str(found.value)
    assert "lost stage 1 (rank 1 on node" in text
    assert "stage 0 (rank 0 on node" in text
    assert "stage 2 (rank 2 on node" in text
    assert "step 4: recv x from rank 1" in text


def test_a_rank_that_cannot_be_built_fails_the_start_and_frees_its_devices() -> None:
    run = run_with(Fault("build", 0, 0), world=1)
    with pytest.raises(TrainingError, match="during start-up: the fake cannot be built"):
        run.start()
    run.close()


def test_a_hang_is_reported_with_every_position_and_can_be_closed() -> None:
    with (
        run_with(Fault("hang", 0, 1), timeout_s=2.0) as run,
        pytest.raises(CommTimeoutError, match="where the ranks stood") as found,
    ):
        run.train(0, 3)
    assert "rank 0 on node" in str(found.value)
    assert "step 1: 0F0" in str(found.value)


def test_closing_while_a_step_runs_ends_everything() -> None:
    run = run_with(Fault("hang", 0, 2), world=1)
    run.start()
    failures: list[BaseException] = []

    def train() -> None:
        try:
            run.train(0, 5)
        except BaseException as error:
            failures.append(error)

    started = threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), train()))
    thread.start()
    started.wait()
    run.close()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(failures[0], RayparError)


def test_more_ranks_than_the_cluster_has_is_refused_with_numbers() -> None:
    run = RayRun(fake_specs(64), runner=FakeFactory())
    with pytest.raises(ClusterError, match="can never hold what was asked") as found:
        run.start()
    assert "64" in str(found.value)
    run.close()


def test_a_driver_that_is_killed_takes_its_actors_and_devices_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_with(world=1)
    run.start()
    try:
        ray.kill(run._driver, no_restart=True)
        with pytest.raises(StageDiedError, match="lost the driver actor of run test-"):
            run.train(0, 3)

        # What ranks had answered is the driver's: it may be gone as well.
        def gone(refs: Any, timeout: float | None = None) -> Any:
            raise ray.exceptions.OwnerDiedError("00" * 28, None, "")

        with monkeypatch.context() as patched:
            patched.setattr(ray, "get", gone)
            with pytest.raises(StageDiedError, match="lost the driver actor of run test-"):
                run._ask([])
    finally:
        run.close()
