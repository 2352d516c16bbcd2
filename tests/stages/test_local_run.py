"""The in-process backend: steps, faults and state, with ranks that have no programs."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from raypar.errors import (
    CommTimeoutError,
    NonFiniteError,
    OptimizerError,
    RayparError,
    TrainingError,
)
from raypar.stages.local import LocalRun
from raypar.stages.run import StepResult, merge_reports
from raypar.stages.spec import StepReport
from tests.stages.fakes import FakeFactory, Fault, fake_specs, two


def run_with(*faults: Fault, world: int = 2, timeout_s: float = 20.0) -> LocalRun:
    return LocalRun(fake_specs(world), runner=FakeFactory(faults), timeout_s=timeout_s)


def test_steps_are_reported_in_order_and_training_goes_on() -> None:
    got: list[int] = []
    with run_with(world=3) as run:
        run.train(0, 4, lambda r: got.append(r.step))
        run.train(4, 2, lambda r: got.append(r.step))
        assert got == list(range(6))
        assert torch.equal(run.gradients()["layers.2.bias"], torch.full((2,), 16.0))
        assert run.memory() == [{"parameters": 8, "total": 8}] * 3


def test_the_state_has_the_models_own_names_and_ties() -> None:
    with run_with() as run:
        run.train(0, 5)
        state = run.state_dict()
    torch.manual_seed(0)
    model = two()
    assert list(state) == list(model.state_dict())
    assert torch.equal(state["layers.0.bias"], torch.full((2,), 5.0))
    assert torch.equal(state["again.bias"], state["layers.0.bias"])
    # What no rank holds has the value that the seed gives.
    assert torch.equal(state["unused"], model.state_dict()["unused"])
    model.load_state_dict(state)


def test_the_random_state_of_the_process_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with run_with() as run:
        run.train(0, 1)
        run.state_dict()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_in_a_step_ends_all_ranks_and_is_the_one_raised(rank: int) -> None:
    got: list[int] = []
    with run_with(Fault("raise", rank, 3), world=3) as run:
        with pytest.raises(TrainingError, match=f"rank {rank}\\) raised ValueError in step 3"):
            run.train(0, 9, lambda r: got.append(r.step))
        assert got == [0, 1, 2]


def test_an_optimizer_error_keeps_its_class() -> None:
    with (
        run_with(Fault("optimizer", 0, 2)) as run,
        pytest.raises(OptimizerError, match="no reason"),
    ):
        run.train(0, 5)


def test_a_rank_that_cannot_be_built_fails_the_start() -> None:
    run = run_with(Fault("build", 1, 0))
    with pytest.raises(TrainingError, match="during start-up: the fake cannot be built"):
        run.start()
    run.close()


def test_a_step_that_is_not_finite_is_reported_and_later_ones_are_dropped() -> None:
    got: list[StepResult] = []
    with run_with(Fault("nan", 1, 2)) as run:
        with pytest.raises(NonFiniteError, match="step 2: not finite: stage 1 loss"):
            run.train(0, 9, got.append)
        assert [r.step for r in got] == [0, 1, 2]
        assert [r.applied for r in got] == [True, True, False]
        # Two steps were applied, on every rank.
        assert torch.equal(run.state_dict()["layers.0.bias"], torch.full((2,), 2.0))


def test_a_hang_ends_with_every_ranks_position() -> None:
    with (
        run_with(Fault("hang", 0, 1), timeout_s=0.3) as run,
        pytest.raises(CommTimeoutError, match="where the ranks stood") as found,
    ):
        run.train(0, 3)
    assert "stage 0 (rank 0): step 1: 0F0" in str(found.value)


def test_closing_leaves_no_threads_and_a_callers_error_passes_through() -> None:
    before = threading.active_count()

    def stop(result: StepResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_with(Fault("slow", 0, 1)) as run:
        run.train(0, 50, stop)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_reports_of_one_step_are_added_up() -> None:
    rows = [
        StepReport(7, loss=0.25, grad_norm=2.0, seconds={"total": 0.5}),
        StepReport(7, grad_norm=2.0, seconds={"total": 0.7}),
        StepReport(7, loss=0.5, grad_norm=2.0, applied=False, non_finite="stage 2 loss"),
    ]
    found = merge_reports(rows)
    assert (found.step, found.loss, found.grad_norm, found.seconds) == (7, 0.75, 2.0, 0.7)
    assert not found.applied
    assert found.non_finite == ("stage 2 loss",)


def test_a_stop_ends_all_ranks_before_the_same_step_and_training_goes_on() -> None:
    got: list[int] = []
    with run_with(world=3) as run:

        def seen(result: StepResult) -> None:
            got.append(result.step)
            if result.step == 3:
                run.request_stop()

        following = run.train(0, 100_000, seen)
        assert got == list(range(following))
        assert 4 <= following < 100_000
        assert run.call("completed_steps") == [following] * 3
        assert run.train(following, 2, horizon=following + 9) == following + 2


def test_a_stop_while_ranks_are_let_go_ends_all_of_them_before_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with run_with(world=2) as run:
        run.train(0, 2)
        last = run._seats[1].worker
        assert last is not None
        let_go, stop = last.go_on, threading.Thread(target=run.request_stop)

        def late() -> None:
            stop.start()
            stop.join(0.3)  # between the first rank and the last, if it can be
            let_go()

        monkeypatch.setattr(last, "go_on", late)
        following = run.train(2, 100_000)
        stop.join()
        assert following < 100_002
        assert run.call("completed_steps") == [following] * 2


def test_a_call_reaches_worker_and_runner_and_names_what_is_not_there() -> None:
    with run_with(world=2) as run:
        assert [sorted(m) for m in run.call("memory")] == [["parameters", "total"]] * 2
        with pytest.raises(RayparError, match="has no method 'nothing_like_it'"):
            run.call("nothing_like_it")
        with pytest.raises(RayparError, match="has no method '_step'"):
            run.call("_step", 1)
