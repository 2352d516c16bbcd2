"""One interface for a run, on Ray actors or on threads of this process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from raypar.errors import NonFiniteError
from raypar.stages.consolidate import assemble, consolidate
from raypar.stages.faults import RankInfo
from raypar.stages.spec import RankSpec, StepReport

START_TIMEOUT_S = 300.0
"""Deadline of bringing ranks up: they build their parts of the model."""


@dataclass(frozen=True)
class StepResult:
    """One finished step of the whole run.

    Attributes:
        step: Step number, 0-based.
        loss: Global loss (the sum of the ranks' shares).
        grad_norm: Global gradient norm before clipping, if known.
        applied: Whether the optimizer step was applied.
        non_finite: What was not finite, and where.
        seconds: Wall time of the slowest rank.
        ranks: Every rank's own report, by rank.
        skipped: Not applied, because the loss scale was too large; the run goes on.
    """

    step: int
    loss: float | None
    grad_norm: float | None
    applied: bool
    non_finite: tuple[str, ...]
    seconds: float
    ranks: tuple[StepReport, ...]
    skipped: bool = False

    @property
    def ends_run(self) -> bool:
        """Whether no step may follow: it was not finite, and not merely for the loss scale."""
        return not (self.applied or self.skipped)


OnReport = Callable[[StepResult], None]


def merge_reports(reports: Sequence[StepReport]) -> StepResult:
    """One result from every rank's report of the same step."""
    shares = [r.loss for r in reports if r.loss is not None]
    norms = [r.grad_norm for r in reports if r.grad_norm is not None]
    return StepResult(
        step=reports[0].step,
        loss=sum(shares) if shares else None,
        grad_norm=norms[0] if norms else None,
        applied=all(r.applied for r in reports),
        non_finite=tuple(dict.fromkeys(r.non_finite for r in reports if r.non_finite)),
        seconds=max((r.seconds.get("total", 0.0) for r in reports), default=0.0),
        ranks=tuple(reports),
        skipped=any(r.skipped for r in reports),
    )


def merge_notes(notes: Sequence[str | None]) -> list[str]:
    """Every different note of the ranks once, with the ranks that it is of."""
    ranks: dict[str, list[int]] = {}
    for rank, note in enumerate(notes):
        if note:
            ranks.setdefault(note, []).append(rank)
    return [
        f"rank{'s' * (len(which) > 1)} {', '.join(map(str, which))}: {note}"
        for note, which in ranks.items()
    ]


def raise_if_not_finite(result: StepResult) -> None:
    """Raises for a step that was not applied.

    Raises:
        NonFiniteError: Names the step and the stages.
    """
    if not result.ends_run:
        return
    places = ", ".join(result.non_finite) or "a gradient"
    raise NonFiniteError(
        f"step {result.step}: not finite: {places} (loss {result.loss}, gradient norm "
        f"{result.grad_norm}); the step was not applied and later steps were dropped. Lower the "
        "learning rate, set clip_norm (for example 1.0), or look at this step's batch"
    )


class Run(ABC):
    """A plan at work. Start it, train any number of times, read its state, close it."""

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        self._specs = tuple(specs)
        self.infos: list[RankInfo] = []
        self.notes: list[str] = []  # filled by `start`: what users should know, each told once

    @abstractmethod
    def start(self) -> dict[str, float]:
        """Brings every rank up.

        Returns:
            Seconds that each part of it took.
        """

    @abstractmethod
    def train(
        self,
        first_step: int,
        steps: int,
        on_report: OnReport | None = None,
        *,
        horizon: int | None = None,
    ) -> int:
        """Runs `steps` steps from `first_step` on, or fewer after `request_stop`.

        Args:
            first_step: Number of the first step.
            steps: How many steps.
            on_report: Called in this thread, in step order, for every finished step.
            horizon: Steps below it will follow in later calls, so their data may be read ahead;
                default: none will.

        Returns:
            The number of the step that comes next.

        Raises:
            NonFiniteError: A step was not finite; it was reported, and not applied.
            DataError: The data source raised, ended early, or changed its form.
            StageDiedError: A rank's process or node is gone.
            TrainingError: A rank raised.
        """

    @abstractmethod
    def request_stop(self) -> None:
        """Has `train` end soon, on all ranks before the same step; from any thread.

        A later `train` goes on as if nothing had been.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases everything; safe to call twice, and after a failure."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> list[Any]:
        """Calls a public method of every rank, between steps.

        Args:
            method: A method of `raypar.stages.worker.RankWorker`, or of its runner.
            *args: The same for all ranks; they travel by value.

        Returns:
            The answers, by rank.

        Raises:
            StageDiedError: A rank's process or node is gone.
            TrainingError: A rank raised; errors of raypar keep their type.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of the whole model.

        Returns:
            A dict with the keys, and in the order, of the model's own ``state_dict()``; names
            that are tied in the model share a tensor.
        """
        return consolidate(self._specs, self.call("state"))

    def gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradients by parameter name, if the specs keep them."""
        return assemble(self._specs, self.call("gradients"))

    def memory(self) -> list[dict[str, int]]:
        """Bytes that every rank holds from step to step, measured on the tensors themselves.

        Returns:
            By rank: ``parameters``, ``gradients``, ``optimizer`` (its states) and ``total``; after
            a step, since gradients and states come with it.
        """
        return self.call("memory")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
