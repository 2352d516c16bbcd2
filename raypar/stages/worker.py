"""One rank at work: its runner, its input feed, and the loop over steps.

The same worker runs in a stage actor and in a thread of the in-process backend, so both fail,
stop and report alike.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from raypar.comm.group import Group
from raypar.errors import CommAbortedError, RayparError
from raypar.stages.faults import Failure, RankInfo, failure_of
from raypar.stages.spec import RankSpec, StepReport


class Runner(Protocol):
    """What executes one rank's steps (`raypar.stages.interpreter.RankRunner`)."""

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        """Runs one step on this replica's rows of the batch."""

    def state(self) -> dict[str, torch.Tensor]:
        """The parameters and buffers that this rank owns."""

    def gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradients that this rank owns."""

    def memory(self) -> dict[str, int]:
        """Bytes held from step to step, by what holds them."""

    def positions(self) -> str:
        """Where it stands; from any thread."""

    def abort(self, reason: str) -> None:
        """Ends the step under way; from any thread."""

    def close(self) -> None:
        """Releases what it holds."""


class Feed(Protocol):
    """Where one rank's inputs come from."""

    def extend(self, until: int) -> None:
        """Steps below `until` will be asked for, so their batches may be read ahead."""

    def take(self, step: int) -> Mapping[str, torch.Tensor] | None:
        """The inputs of `step`, waiting for them.

        None if the source stopped before it; the rank that reads the source raises the reason.
        """

    def abort(self, reason: str) -> None:
        """Wakes a `take` that waits; from any thread."""

    def close(self) -> None:
        """Ends its threads."""


RunnerFactory = Callable[[RankSpec, Group], Runner]
FeedFactory = Callable[[RankSpec, Group], Feed]


@dataclass
class Chunk:
    """What a rank tells of a run of consecutive steps.

    Attributes:
        reports: One per finished step.
        stopped: The rank takes no further steps (a non-finite step, the end of the data, an
            abort, a failure).
        failure: What it raised, if it did.
    """

    reports: list[StepReport] = field(default_factory=list)
    stopped: bool = False
    failure: Failure | None = None


def default_runner(spec: RankSpec, world: Group) -> Runner:
    """The interpreter."""
    from raypar.stages.interpreter import RankRunner

    return RankRunner(spec, world)


def info_of(spec: RankSpec, *, needs_gpu: bool = False) -> RankInfo:
    """The name of the rank that `spec` describes."""
    return RankInfo(
        spec.rank,
        spec.replica,
        spec.replicas,
        spec.device,
        tuple(s.index for s in spec.stages),
        needs_gpu,
    )


class _EmptyFeed:
    """The feed of a run without inputs."""

    def extend(self, until: int) -> None:
        pass

    def take(self, step: int) -> Mapping[str, torch.Tensor]:
        return {}

    def abort(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Gate:
    """Before every step: whether it may begin.

    So all ranks end before the same step: each is held, tells what it has begun, and is told the
    step after the last that any of them has.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._begun = -1
        self._held = False
        self._end: int | None = None

    def admits(self, step: int) -> bool:
        with self._turn:
            self._turn.wait_for(lambda: not self._held)
            if self._end is not None and step >= self._end:
                return False
            self._begun = step
            return True

    def hold(self) -> int:
        with self._turn:
            self._held = True
            return self._begun

    def end_at(self, step: int | None) -> None:
        with self._turn:
            self._held, self._end = False, step
            self._turn.notify_all()


class RankWorker:
    """Holds one rank's runner and feed, and runs steps until told to stop.

    ``completed`` is the number of the step after the last finished one; ``note`` is what users
    should know of how the rank was built, or None.

    Args:
        spec: What to hold and do.
        world: The group of all ranks.
        feed: Makes this rank's feed; None for programs without inputs.
        runner: Makes the runner; None for the interpreter.
    """

    def __init__(
        self,
        spec: RankSpec,
        world: Group,
        *,
        feed: FeedFactory | None = None,
        runner: RunnerFactory | None = None,
    ) -> None:
        self._spec = spec
        self._world = world
        self._aborted: str | None = None
        self._gate = _Gate()
        self._over = False
        self.completed = 0
        self._standing = "building its programs"
        self._feed: Feed = _EmptyFeed() if feed is None else feed(spec, world)
        self._runner = (runner or default_runner)(spec, world)
        # A runner without one (tests have some) has nothing to tell.
        self.note: str | None = getattr(self._runner, "note", None)
        self._standing = "before its first step"

    def run(
        self,
        first: int,
        count: int,
        until: int,
        on_report: Callable[[StepReport], None] | None = None,
    ) -> Chunk:
        """Runs steps ``first`` to ``first + count - 1``.

        Args:
            first: First step.
            count: Number of steps.
            until: Steps below it will follow in later calls, so data may be read ahead.
            on_report: Called after every step, in this thread.

        Returns:
            The reports of the steps that finished. Errors are in it, never raised: an error that
            is raised through Ray loses its type and its text when its class cannot travel.
        """
        chunk = Chunk(stopped=self._over)
        if self._over:
            return chunk
        step = first
        try:
            self._feed.extend(until)
            for step in range(first, first + count):
                if self._aborted is not None:
                    raise CommAbortedError(self._aborted)
                if not self._gate.admits(step):
                    break
                report = self._step(step)
                if report is None:
                    self._over = True
                    break
                chunk.reports.append(report)
                if on_report is not None:
                    on_report(report)
                self.completed = step + 1
                if report.ends_run:
                    self._over = True  # queued later steps become no-ops
                    break
        except BaseException as error:  # also SystemExit of user code: the others must be told
            self._over = True
            chunk.failure = failure_of(error, self._spec.rank, step)
        chunk.stopped = self._over
        return chunk

    def _step(self, step: int) -> StepReport | None:
        began = time.perf_counter()
        self._standing = f"step {step}: waiting for its batch"
        inputs = self._feed.take(step)
        if inputs is None:
            self._standing = f"stopped before step {step}: the data source ended"
            return None
        waited = time.perf_counter() - began
        self._standing = ""
        report = self._runner.step(step, inputs)
        self._standing = f"step {step} finished"
        report.seconds["data"] = report.seconds.get("data", 0.0) + waited
        report.seconds["total"] = time.perf_counter() - began
        return report

    def hold(self) -> int:
        """Lets no further step begin until `end_at`; from any thread.

        Returns:
            The last step that was begun, -1 before the first.
        """
        return self._gate.hold()

    def end_at(self, step: int | None) -> None:
        """Lets steps begin again, but none from `step` on, if given; from any thread."""
        self._gate.end_at(step)

    def go_on(self) -> None:
        """Lets every step begin again."""
        self._gate.end_at(None)

    def completed_steps(self) -> int:
        """The number of the step after the last finished one."""
        return self.completed

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that this rank owns."""
        return self._runner.state()

    def gradients(self) -> dict[str, torch.Tensor]:
        """The last step's gradients that this rank owns."""
        return self._runner.gradients()

    def memory(self) -> dict[str, int]:
        """Bytes held from step to step, by what holds them."""
        return self._runner.memory()

    def positions(self) -> str:
        """Where it stands; safe from any thread."""
        return self._standing or self._runner.positions()

    def call(self, method: str, *args: Any) -> Any:
        """What a public method of this worker, or else of its runner or feed, answers.

        Raises:
            RayparError: None of them has such a method.
        """
        for holder in (self, self._runner, self._feed):
            found = None if method.startswith("_") else getattr(holder, method, None)
            if callable(found):
                return found(*args)
        raise RayparError(
            f"rank {self._spec.rank} has no method {method!r}: neither its worker, nor "
            f"{type(self._runner).__name__}, nor {type(self._feed).__name__}"
        )

    def abort(self, reason: str) -> None:
        """Ends the step under way, from any thread."""
        self._aborted = self._aborted or reason
        self._gate.end_at(None)  # a rank that is held must come and see
        self._runner.abort(reason)
        self._feed.abort(reason)
        self._world.abort(reason)

    def close(self) -> None:
        """Releases threads, sockets and programs."""
        self._over = True
        self._feed.close()
        self._runner.close()
        self._world.close()
