"""What is done beside steps: evaluations, checkpoints, and telling of all of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raypar.errors import CheckpointError, CommError, StageDiedError
from raypar.plan import Plan
from raypar.stages.run import Run, StepResult
from raypar.train._evaluation_io import EvaluationData
from raypar.train.callbacks import Callback
from raypar.train.checkpoint import CheckpointStore
from raypar.train.display import Display
from raypar.train.evaluate import Evaluator
from raypar.train.metrics import MetricsLog
from raypar.train.settings import STEP_METRICS, Settings
from raypar.train.state import TrainState


@dataclass
class Beside:
    """The hooks of one attempt's loop (`raypar.train.loop.Hooks`).

    Attributes:
        run: The ranks.
        plan: What they run.
        log: Writes ``metrics.jsonl``.
        display: Shows steps.
        callbacks: Told of everything.
        store: Where checkpoints go, or None.
        evaluator: Evaluates, or None.
        evaluation: On what, or None.
        settings: What the trainer was asked for.
    """

    run: Run
    plan: Plan
    log: MetricsLog
    display: Display
    callbacks: Callback
    store: CheckpointStore | None
    evaluator: Evaluator | None
    evaluation: EvaluationData | None
    settings: Settings

    def __post_init__(self) -> None:
        self._last: dict[str, Any] = {}
        self.stall_s = 0.0  # training stood still for checkpoints

    def reported(self, result: StepResult) -> None:
        """See `raypar.train.loop.Hooks`."""
        line = self.log.add(result)
        self._last = {k: line[k] for k in STEP_METRICS if k in line}
        self.display.show(line)
        self.callbacks.on_step(line)

    def settled(self) -> None:
        """See `raypar.train.loop.Hooks`."""
        checkpoints = self.settings.run.checkpoint_config
        if self.store is not None and (checkpoints.every_steps or checkpoints.every_s):
            self.store.make_ready(self.run)

    def evaluate(self, step: int) -> dict[str, Any]:
        """See `raypar.train.loop.Hooks`."""
        assert self.evaluator is not None and self.evaluation is not None
        found = self.evaluator.evaluate(
            self.run, self.evaluation, weights=self.settings.eval_weights
        )
        metrics = {f"eval_{name}": value for name, value in found.items()}
        line = {"step": step, **metrics}
        self.log.evaluation(line)
        self.display.evaluation(line)
        self.callbacks.on_evaluation(line)
        return metrics

    def checkpoint(self, state: TrainState) -> None:
        """See `raypar.train.loop.Hooks`."""
        if self.store is None:
            return
        self.log.flush()  # a run that is resumed from here has the lines of all steps before
        state = replace(state, metrics={**state.metrics, **self._last})
        begun = self.store.begin(self.run, state, self.plan, dict(self.settings.facts))
        if begun is not None:
            self.display.checkpoint(begun.path, begun.step)
            self.callbacks.on_checkpoint(begun.path, begun.step)
            self.stall_s += begun.stall_s

    def finish(self) -> None:
        """See `raypar.train.loop.Hooks`.

        Raises:
            CheckpointError: One could not be written.
            StageDiedError: A rank was lost meanwhile, and what it was writing with it.
        """
        if self.store is None:
            return
        try:
            self.store.wait()
        except CheckpointError as error:
            if isinstance(error.__cause__, (StageDiedError, CommError)):
                raise error.__cause__ from None  # a failure that may pass, as in a step
            raise

    def position(self, step: int) -> dict[str, Any]:
        """See `raypar.train.loop.Hooks`."""
        positions = self.run.call("data_state", step)
        return next((dict(at) for at in positions if at is not None), {})
