"""Step times on a machine that other programs use as well.

Around every few steps the CPU time of the whole machine is compared with that of the ranks: what is
left over is what other programs took. Steps in which that was next to nothing are steps of a quiet
machine, whatever runs there at other times. Where there are too few of those, the time that the
ranks' main threads stood in line for a core (Linux's ``schedstat``) is taken off, and the figure is
marked: lines of several ranks overlap, so that it is a rough one.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raypar.graph.opgraph import OpGraph
from raypar.plan import Plan
from raypar.stages.compile import compile_plan
from raypar.stages.interpreter import RankRunner
from raypar.stages.remote import RayRun
from raypar.stages.run import StepResult
from raypar.stages.spec import StepReport
from raypar.testing.backends import RepeatFeed

QUIET = 0.05
"""Steps count as quiet where other programs took less than this share of all cores."""
ENOUGH = 6
"""Quiet steps that make a figure."""
_LINE = Path("/proc/thread-self/schedstat")
_CORES = os.cpu_count() or 1


class CountedRank(RankRunner):
    """Adds to every report ``cpu``, seconds that all threads of this process were on a core, and
    ``line``, seconds that the one which runs the step stood in line for one."""

    def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> StepReport:
        """Runs one step, between two looks at the clocks."""
        cpu, line = time.process_time(), _in_line()
        report = super().step(step, inputs)
        report.seconds["cpu"] = time.process_time() - cpu
        report.seconds["line"] = _in_line() - line
        return report


def _in_line() -> float:
    """Seconds that this thread has stood in line for a core; 0 where nobody counts them."""
    try:
        return 1e-9 * int(_LINE.read_text().split()[1])
    except OSError:
        return 0.0


def _machine_busy() -> float:
    """CPU seconds of all programs of the machine since it was started; 0 where nobody counts."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _io, *rest = map(int, fields[:8])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        seconds: Wall time of the slowest rank.
        cpu: Per rank the CPU seconds of its process.
        line: Per rank the seconds that its main thread stood in line for a core.
        disturbed: Share of all cores that other programs took, on average over the steps that were
            asked for together with this one.
    """

    seconds: float
    cpu: tuple[float, ...]
    line: tuple[float, ...]
    disturbed: float

    @property
    def corrected(self) -> float:
        """The step without the longest line, where there is a core for every rank."""
        return self.seconds - max(self.line) if len(self.line) <= _CORES else self.seconds


@dataclass(frozen=True)
class Figure:
    """Seconds of a step.

    Attributes:
        seconds: The median of the quiet steps, else of the least disturbed ones, corrected.
        quiet: Quiet steps it rests on; 0 where it is corrected.
        disturbed: Median share of disturbance in the steps it rests on.
        cpu: Seconds on a core of the busiest rank, median.
    """

    seconds: float
    quiet: int
    disturbed: float
    cpu: float


def figure_of(steps: Sequence[Step], enough: int = ENOUGH) -> Figure:
    """The figure that steps make."""
    ranked = sorted(steps, key=lambda s: s.disturbed)
    quiet = [s for s in ranked if s.disturbed < QUIET]
    used = quiet if len(quiet) >= enough else ranked[: max(enough, len(ranked) // 4)]
    times = [s.seconds if len(quiet) >= enough else s.corrected for s in used]
    return Figure(
        statistics.median(times),
        len(quiet) if len(quiet) >= enough else 0,
        statistics.median(s.disturbed for s in used),
        statistics.median(max(s.cpu) for s in used),
    )


class CountedRun:
    """A plan on stage actors of Ray, one thread each, told to train a few steps at a time.

    Args:
        graph: The captured model.
        batch: The batch that every step trains on.
        plan: How to split it.
        optimizer: Builds the optimizer from one rank's parameters.
        name: What to call it in tables.
    """

    def __init__(
        self,
        graph: OpGraph,
        batch: Sequence[torch.Tensor],
        plan: Plan,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        name: str = "",
    ) -> None:
        self.name = name
        specs = compile_plan(graph, plan, optimizer=optimizer, threads=1)
        feed = functools.partial(RepeatFeed, tensors=list(batch))
        self._run = RayRun(specs, feed=feed, runner=CountedRank)
        self._done = 0
        try:
            self._run.start()
        except BaseException:
            self._run.close()
            raise

    def steps(self, count: int) -> list[Step]:
        """Trains `count` steps."""
        results: list[StepResult] = []
        began, busy = time.perf_counter(), _machine_busy()
        self._run.train(self._done, count, results.append)
        self._done += count
        own = [[rank.seconds for rank in result.ranks] for result in results]
        others = _machine_busy() - busy - sum(s["cpu"] for ranks in own for s in ranks)
        disturbed = max(0.0, others) / (_CORES * (time.perf_counter() - began))
        return [
            Step(
                result.seconds,
                tuple(s["cpu"] for s in ranks),
                tuple(s["line"] for s in ranks),
                disturbed,
            )
            for result, ranks in zip(results, own, strict=True)
        ]

    def until_quiet(self, warm_up: int, least: int, most_s: float) -> list[Step]:
        """Trains until `ENOUGH` steps were quiet, at least `least`, or time is out.

        Args:
            warm_up: Steps that do not count.
            least: Steps that count.
            most_s: Seconds after which it ends in any case.
        """
        self.steps(warm_up)
        end = time.monotonic() + most_s
        found = self.steps(least)
        while time.monotonic() < end and sum(s.disturbed < QUIET for s in found) < ENOUGH:
            found += self.steps(least)
        return found

    def close(self) -> None:
        """Ends the actors; safe to call twice."""
        self._run.close()


def load() -> float:
    """The machine's load average over the last minute."""
    return os.getloadavg()[0]
