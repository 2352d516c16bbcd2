"""The loop over steps: segments that end where a checkpoint, an evaluation or the end is due."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from raypar.errors import ConfigError
from raypar.stages.run import Run, StepResult
from raypar.train._kinds import NUMBER, check_kinds
from raypar.train.state import TrainState

_ASK_AGAIN_S = 0.5
_EARLY = {
    "metric": (str, "the name of a metric, for example 'eval_loss'"),
    "patience": (int, "a number of evaluations, at least 1"),
    "min_delta": (NUMBER, "a number, 0 or more"),
}


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Ends a run when a metric no longer gets better.

    Attributes:
        metric: Of evaluations, such as ``eval_loss``.
        patience: Evaluations in a row that may pass without a better value.
        min_delta: By how much a value has to be better to count.
        mode: Whether ``"min"`` or ``"max"`` is better.

    Raises:
        ConfigError: A value is out of range.
    """

    metric: str = "eval_loss"
    patience: int = 3
    min_delta: float = 0.0
    mode: str = "min"

    def __post_init__(self) -> None:
        check_kinds("early_stop.", self, _EARLY)
        if self.patience < 1:
            raise ConfigError(f"early_stop.patience is {self.patience!r}; give at least 1")
        if self.min_delta < 0:
            raise ConfigError(f"early_stop.min_delta is {self.min_delta!r}; give 0 or more")
        if self.mode not in ("min", "max"):
            raise ConfigError(f"early_stop.mode is {self.mode!r}; give 'min' or 'max'")

    def after(self, known: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        """What is known after one more evaluation: ``best`` and ``passed`` without a better one.

        Raises:
            ConfigError: The evaluation has no such metric.
        """
        if self.metric not in metrics:
            raise ConfigError(
                f"early_stop.metric is {self.metric!r}; evaluations give {sorted(metrics)}"
            )
        value = float(metrics[self.metric])
        best = known.get("best")
        sign = 1.0 if self.mode == "min" else -1.0
        if best is None or sign * value < sign * best - self.min_delta:
            return {"best": value, "passed": 0}
        return {"best": best, "passed": int(known["passed"]) + 1}

    def reason(self, known: dict[str, Any]) -> str:
        """Why a run of which `after` told `known` is over; empty where it goes on."""
        if known.get("passed", 0) < self.patience:
            return ""
        return (
            f"{self.metric} has not got better than {known['best']:g} in "
            f"{known['passed']} evaluations"
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run ends, and what is due on its way.

    Attributes:
        steps: Optimizer steps in all.
        time_limit_s: Training seconds in all, over all attempts; None: no limit.
        checkpoint_steps: Steps between checkpoints, or None.
        checkpoint_s: Seconds between checkpoints, or None.
        checkpoint_at_end: Whether one is written at the end, and when the run is stopped.
        evaluate: Whether there is an evaluation at the end.
        evaluate_steps: Steps between evaluations, or None.
        early_stop: Ends the run when evaluations no longer get better, or None.
    """

    steps: int
    time_limit_s: float | None = None
    checkpoint_steps: int | None = None
    checkpoint_s: float | None = None
    checkpoint_at_end: bool = True
    evaluate: bool = False
    evaluate_steps: int | None = None
    early_stop: EarlyStop | None = None

    def border(self, step: int) -> int:
        """The next step at which something is due."""
        periods = [p for p in (self.checkpoint_steps, self.evaluate_steps) if p]
        return min([self.steps, *((step // p + 1) * p for p in periods)])


class Hooks(Protocol):
    """What the loop does beside steps."""

    def reported(self, result: StepResult) -> None:
        """A step was finished."""

    def settled(self) -> None:
        """The first step of the attempt is done: ranks hold all that they ever will."""

    def evaluate(self, step: int) -> dict[str, Any]:
        """Evaluates between two steps; metrics as plain numbers."""

    def checkpoint(self, state: TrainState) -> None:
        """Begins a checkpoint between two steps."""

    def finish(self) -> None:
        """Returns once every checkpoint that was begun is there."""

    def position(self, step: int) -> dict[str, Any]:
        """Position in the training data after so many steps."""


class TrainLoop:
    """Runs the steps of one attempt.

    Args:
        run: The ranks, started.
        state: Where to begin.
        limits: When to end.
        hooks: What to do beside steps.
        samples: Samples of a step.
        on_first: Called after the first step of the attempt.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        limits: Limits,
        hooks: Hooks,
        *,
        samples: int,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        self._run = run
        self.state = state
        self._limits = limits
        self._hooks = hooks
        self._samples = samples
        self._on_first = on_first
        self._saved_at = state.step if state.step else -1  # what is resumed from is saved
        self._saved_when = time.monotonic()
        self.stopped = ""  # why it ended before its last step
        self._ended = False  # the data did
        self._settled = False
        self._signal: BaseException | None = None
        self._watch = _Watch(run)

    def interrupt(self, error: BaseException) -> None:
        """Has the loop end after the steps under way, with a checkpoint, and raise `error`."""
        self._signal = error
        self._watch.stop_now()

    def go(self) -> TrainState:
        """Runs until the last step, a limit, or an interruption; what was saved then is there.

        Raises:
            BaseException: What `interrupt` was given.
        """
        try:
            self._go()
        except Exception as error:
            if self._signal is None:
                raise
            raise self._signal from error  # it ends as it was asked to, whatever else went wrong
        if self._signal is not None:
            raise self._signal
        return self.state

    def _go(self) -> None:
        self.stopped = self._over_already()
        with self._watch:
            while not self._ended and not self.stopped and self.state.step < self._limits.steps:
                self._segment()
                self._at_border()
        if self._limits.checkpoint_at_end and self._saved_at != self.state.step:
            self._save()
        self._hooks.finish()

    def _over_already(self) -> str:
        """Why the run that is resumed was over before its last step; empty where it was not."""
        limits = self._limits
        if limits.early_stop is not None:
            return limits.early_stop.reason(self.state.extra.get("early_stop", {})) or self._late()
        return self._late()

    def _late(self) -> str:
        limit = self._limits.time_limit_s
        over = limit is not None and self.state.seconds >= limit
        return f"time limit of {limit:g} s" if over else ""

    def _segment(self) -> None:
        began, limits = time.monotonic(), self._limits
        deadlines = (
            [began + limits.time_limit_s - self.state.seconds] if limits.time_limit_s else []
        )
        if limits.checkpoint_s:
            deadlines.append(self._saved_when + limits.checkpoint_s)
        first = self.state.step
        border = limits.border(first) if self._settled else first + 1
        with self._watch.until(min(deadlines, default=None)):
            reached = self._run.train(first, border - first, self._reported, horizon=limits.steps)
        self._ended = reached < border and not self._watch.asked
        if not self._settled and reached > first:
            self._settled = True
            self._hooks.settled()
        self.state = replace(
            self.state,
            step=reached,
            samples=self.state.samples + (reached - first) * self._samples,
            seconds=self.state.seconds + time.monotonic() - began,
        )

    def _reported(self, result: StepResult) -> None:
        if self._on_first is not None:
            self._on_first()
            self._on_first = None
        self._hooks.reported(result)

    def _at_border(self) -> None:
        limits, step = self._limits, self.state.step
        late = self._late()
        self.stopped = late
        last = step >= limits.steps or self._ended or bool(late)
        if self._due(limits.evaluate_steps) or (limits.evaluate and last):
            self._evaluate()
        by_time = limits.checkpoint_s is not None and (
            time.monotonic() - self._saved_when >= limits.checkpoint_s
        )
        if (self._due(limits.checkpoint_steps) or by_time) and self._saved_at != step:
            self._save()
        if self._signal is not None:  # it came meanwhile: no other step begins
            self.stopped = "interrupted"

    def _due(self, period: int | None) -> bool:
        return bool(period) and self.state.step % int(period or 1) == 0

    def _evaluate(self) -> None:
        if self._signal is not None:
            return  # the stop time is short
        metrics = self._hooks.evaluate(self.state.step)
        self.state = replace(self.state, metrics={**self.state.metrics, **metrics})
        rule = self._limits.early_stop
        if rule is None:
            return
        known = rule.after(self.state.extra.get("early_stop", {}), metrics)
        self.state = replace(self.state, extra={**self.state.extra, "early_stop": known})
        self.stopped = rule.reason(known) or self.stopped

    def _save(self) -> None:
        self.state = replace(self.state, data=self._hooks.position(self.state.step))
        self._hooks.checkpoint(self.state)
        self._saved_at, self._saved_when = self.state.step, time.monotonic()


class _Watch:
    """A thread that stops the run's steps when it is time, or when asked.

    A signal's handler must wait for nothing, and asking a run to stop waits for its ranks.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._lock = threading.Lock()
        # Its `put` may be called from a handler, whatever the interrupted code was doing.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._deadline: float | None = None
        self._training = self._now = self._over = False
        self.asked = False  # to stop, in the segment under way
        self._thread = threading.Thread(target=self._serve, name="raypar-watch", daemon=True)

    def stop_now(self) -> None:
        self._now = True
        self._wake.put(None)

    @contextmanager
    def until(self, deadline: float | None) -> Iterator[None]:
        self._set(True, deadline)
        try:
            yield
        finally:
            self._set(False, None)

    def _set(self, training: bool, deadline: float | None) -> None:
        with self._lock:
            self._training, self._deadline = training, deadline
            self.asked = self.asked and not training
        self._wake.put(None)

    def _serve(self) -> None:
        while not self._over:
            if self._due():
                try:
                    self._run.request_stop()
                except Exception:  # the run failed meanwhile: the loop is told of that
                    return
            with contextlib.suppress(queue.Empty):
                self._wake.get(timeout=self._pause())

    def _due(self) -> bool:
        with self._lock:
            late = self._deadline is not None and time.monotonic() >= self._deadline
            due = self._training and (self._now or late)
            self.asked = self.asked or due
            return due

    def _pause(self) -> float:
        with self._lock:
            if self._deadline is None:
                return _ASK_AGAIN_S
            return min(_ASK_AGAIN_S, max(0.01, self._deadline - time.monotonic()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        self._wake.put(None)
        self._thread.join(2 * _ASK_AGAIN_S)
