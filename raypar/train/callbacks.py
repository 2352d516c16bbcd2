"""What is told of a run while it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.stages.faults import RankInfo


@dataclass(frozen=True)
class RunFacts:
    """What is known once the ranks are up.

    Attributes:
        name: The run's name.
        folder: Its folder.
        plan: What is run.
        graph: The captured model.
        cluster: The devices.
        infos: The ranks.
        first_step: Number of the first step of this attempt.
        steps: Optimizer steps in all; None where only the end of the data tells.
        config: The configuration as plain values, where the run was started from one.
        startup: Seconds of each part of the start, ``plan`` among them where one was searched.
    """

    name: str
    folder: Path
    plan: Plan
    graph: OpGraph
    cluster: Cluster
    infos: Sequence[RankInfo]
    first_step: int = 0
    steps: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    startup: dict[str, float] = field(default_factory=dict)


class Callback:
    """Told of a run in the process that called ``fit``; override what you need.

    An error that a callback raises ends the run, as one of the training loop would. Time spent
    here is hidden, as long as steps are dispatched ahead, but for `on_checkpoint` and
    `on_evaluation`.
    """

    def on_start(self, run: RunFacts) -> None:
        """The ranks are up; called again for every attempt after a failure."""

    def on_step(self, line: dict[str, Any]) -> None:
        """A step was finished; `line` is its line of ``metrics.jsonl``."""

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation was finished: ``step`` and ``eval_*`` metrics."""

    def on_checkpoint(self, path: str, step: int) -> None:
        """A checkpoint of so many steps was begun; it is written in the background."""

    def on_event(self, event: dict[str, Any]) -> None:
        """Something else worth knowing happened: ``kind``, ``step``, ``text``."""

    def on_end(self, result: dict[str, Any]) -> None:
        """The run is over; `result` is what ``result.json`` holds."""


class Callbacks(Callback):
    """Several callbacks as one, told in order."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = tuple(members)

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`."""
        for member in self._members:
            member.on_start(run)

    def on_step(self, line: dict[str, Any]) -> None:
        """See `Callback.on_step`."""
        for member in self._members:
            member.on_step(line)

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See `Callback.on_evaluation`."""
        for member in self._members:
            member.on_evaluation(line)

    def on_checkpoint(self, path: str, step: int) -> None:
        """See `Callback.on_checkpoint`."""
        for member in self._members:
            member.on_checkpoint(path, step)

    def on_event(self, event: dict[str, Any]) -> None:
        """See `Callback.on_event`."""
        for member in self._members:
            member.on_event(event)

    def on_end(self, result: dict[str, Any]) -> None:
        """See `Callback.on_end`; all are told, also where one raises."""
        with ExitStack() as stack:
            for member in reversed(self._members):
                stack.callback(member.on_end, result)
