"""The loop over steps: what is due when, limits, early stop, interruptions."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from raypar.errors import ConfigError, StageDiedError
from raypar.stages.run import OnReport, Run, StepResult
from raypar.train.loop import EarlyStop, Limits, TrainLoop
from raypar.train.state import TrainState


class FakeRun(Run):
    """Counts steps; each takes a while."""

    def __init__(self, step_s: float = 0.0, data_end: int | None = None) -> None:
        super().__init__([])
        self.data_end = data_end
        self.step_s = step_s
        self.segments: list[tuple[int, int, int | None]] = []
        self._stop = threading.Event()

    def start(self) -> dict[str, float]:
        return {}

    def train(
        self,
        first_step: int,
        steps: int,
        on_report: OnReport | None = None,
        *,
        horizon: int | None = None,
    ) -> int:
        self.segments.append((first_step, steps, horizon))
        self._stop.clear()
        for step in range(first_step, first_step + steps):
            if self._stop.is_set() or step == self.data_end:
                return step
            time.sleep(self.step_s)
            if on_report is not None:
                on_report(StepResult(step, 1.0, None, True, (), self.step_s, ()))
        return first_step + steps

    def request_stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        pass

    def call(self, method: str, *args: Any) -> list[Any]:
        return []


class Told:
    """Hooks that write down what happened."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.losses = losses or []
        self.saved: list[TrainState] = []

    def reported(self, result: StepResult) -> None:
        self.events.append(("step", result.step))

    def settled(self) -> None:
        self.events.append(("settled", 0))

    def evaluate(self, step: int) -> dict[str, Any]:
        self.events.append(("evaluate", step))
        return {"eval_loss": self.losses.pop(0) if self.losses else 1.0}

    def checkpoint(self, state: TrainState) -> None:
        self.events.append(("checkpoint", state.step))
        self.saved.append(state)

    def finish(self) -> None:
        pass

    def position(self, step: int) -> dict[str, Any]:
        return {"at": step}

    def other(self) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] not in ("step", "settled")]


def loop_of(run: FakeRun, told: Told, first: TrainState | None = None, **limits: Any) -> TrainLoop:
    return TrainLoop(run, first or TrainState(), Limits(**limits), told, samples=4)


def test_what_is_due_comes_at_its_step_and_evaluation_before_checkpoint() -> None:
    run, told = FakeRun(), Told()
    loop = loop_of(run, told, steps=10, checkpoint_steps=4, evaluate_steps=3, evaluate=True)
    state = loop.go()
    assert (state.step, state.samples) == (10, 40)
    assert told.other() == [
        ("evaluate", 3), ("checkpoint", 4), ("evaluate", 6), ("checkpoint", 8), ("evaluate", 9),
        ("evaluate", 10), ("checkpoint", 10),
    ]  # fmt: skip
    assert [e[1] for e in told.events if e[0] == "step"] == list(range(10))
    assert {horizon for _, _, horizon in run.segments} == {10}
    assert told.saved[-1].metrics == {"eval_loss": 1.0}
    assert told.saved[0].data == {"at": 4}


def test_a_resume_keeps_the_rhythm() -> None:
    run, told = FakeRun(), Told()
    loop_of(run, told, TrainState(step=6, samples=24), steps=9, checkpoint_steps=4).go()
    assert run.segments == [(6, 1, 9), (7, 1, 9), (8, 1, 9)]
    assert told.events[:2] == [("step", 6), ("settled", 0)]
    assert told.other() == [("checkpoint", 8), ("checkpoint", 9)]
    assert told.saved[-1].samples == 36


def test_evaluations_that_get_no_better_end_the_run_also_over_a_resume() -> None:
    rule = EarlyStop(patience=2)
    run, told = FakeRun(), Told([1.0, 2.0])
    first = loop_of(run, told, steps=4, evaluate_steps=2, early_stop=rule)
    state = first.go()
    assert not first.stopped
    run, told = FakeRun(), Told([1.5, 0.1])
    second = loop_of(run, told, state, steps=10, evaluate_steps=2, early_stop=rule)
    assert second.go().step == 6
    assert second.stopped == "eval_loss has not got better than 1 in 2 evaluations"
    with pytest.raises(ConfigError, match=r"early_stop\.metric is 'accuracy'"):
        EarlyStop(metric="accuracy").after({}, {"eval_loss": 1.0})


def test_a_time_limit_ends_the_run_with_a_checkpoint() -> None:
    run, told = FakeRun(0.01), Told()
    loop = loop_of(run, told, steps=100_000, time_limit_s=0.2)
    state = loop.go()
    assert 0 < state.step < 100_000
    assert "time limit" in loop.stopped
    assert told.other() == [("checkpoint", state.step)]


def test_a_run_that_was_over_early_trains_no_more_when_it_is_resumed() -> None:
    over = TrainState(step=4, seconds=3.0, extra={"early_stop": {"best": 0.5, "passed": 2}})
    rule = EarlyStop(patience=2)
    for limits in ({"early_stop": rule, "evaluate_steps": 2}, {"time_limit_s": 2.0}):
        run = FakeRun()
        loop = loop_of(run, Told(), over, steps=9, **limits)
        assert loop.go().step == 4
        assert loop.stopped
        assert not run.segments
    run = FakeRun()
    more = {"early_stop": EarlyStop(patience=3), "time_limit_s": 60.0}
    loop_of(run, Told([0.1] * 9), over, steps=6, evaluate_steps=2, **more).go()
    assert run.segments


def test_checkpoints_come_by_time_and_training_goes_on() -> None:
    run, told = FakeRun(0.02), Told()
    loop_of(run, told, steps=100, checkpoint_s=0.6).go()
    assert len(told.saved) >= 2
    assert told.saved[-1].step == 100


def test_an_interruption_ends_with_a_checkpoint_and_is_raised() -> None:
    run, told = FakeRun(0.01), Told()
    loop = loop_of(run, told, steps=100_000)
    timer = threading.Timer(0.2, lambda: loop.interrupt(KeyboardInterrupt()))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        loop.go()
    timer.join()
    assert told.other() == [("checkpoint", loop.state.step)]
    assert 0 < loop.state.step < 100_000


def test_the_end_of_the_data_ends_the_run() -> None:
    run, told = FakeRun(data_end=5), Told()
    loop = loop_of(run, told, steps=10**9, checkpoint_steps=3, evaluate=True)
    assert loop.go().step == 5
    assert not loop.stopped
    assert told.other() == [("checkpoint", 3), ("evaluate", 5), ("checkpoint", 5)]


class Failing(FakeRun):
    """Fails once it was asked to stop, as where a rank dies of what interrupted the run."""

    def train(self, *args: Any, **named: Any) -> int:
        reached = super().train(*args, **named)
        if self._stop.is_set():
            raise StageDiedError("lost rank 1")
        return reached


def test_an_interruption_in_an_evaluation_begins_no_other_step() -> None:
    run = FakeRun()

    class Interrupted(Told):
        def evaluate(self, step: int) -> dict[str, Any]:
            loop.interrupt(KeyboardInterrupt())
            return super().evaluate(step)

    told = Interrupted()
    loop = loop_of(run, told, steps=10, evaluate_steps=3)
    with pytest.raises(KeyboardInterrupt):
        loop.go()
    assert told.other() == [("evaluate", 3), ("checkpoint", 3)]
    assert max(step for kind, step in told.events if kind == "step") == 2


def test_an_interruption_wins_over_what_fails_meanwhile() -> None:
    run = Failing(0.01)
    loop = loop_of(run, Told(), steps=1000)
    threading.Timer(0.05, loop.interrupt, [KeyboardInterrupt()]).start()
    with pytest.raises(KeyboardInterrupt) as raised:
        loop.go()
    assert isinstance(raised.value.__cause__, StageDiedError)
