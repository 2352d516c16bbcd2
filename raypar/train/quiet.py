"""Step times on a machine that other programs use as well.

Around every few steps the CPU time of the whole machine is compared with that of the ranks: what is
left over is what other programs took. Steps in which that was next to nothing are steps of a quiet
machine, whatever runs there at other times. Where there are too few of those, the time that the
ranks' main threads stood in line for a core (Linux's ``schedstat``) is taken off, and the figure is
marked: lines of several ranks overlap, so that it is a rough one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raypar.stages.interpreter import RankRunner
from raypar.stages.spec import StepReport

QUIET = 0.05
"""Steps count as quiet where other programs took less than this share of all cores."""
ENOUGH = 6
"""Quiet steps that make a figure."""
_LINE = Path("/proc/thread-self/schedstat")
_CORES = os.cpu_count() or 1


class CountedRank(RankRunner):
    """Counts CPU time in every step.

    Adds to a report's seconds ``cpu``, that all threads of this process were on a core, and
    ``line``, that the one which runs the step stood in line for one.
    """

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


def machine_busy_s() -> float:
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
        disturbed: Share of all cores that other programs took, on average over the steps that were
            asked for together with this one.
        ranks: Every rank's own report, by rank; of `CountedRank`.
    """

    seconds: float
    disturbed: float
    ranks: tuple[StepReport, ...]

    @property
    def cpu(self) -> tuple[float, ...]:
        """Per rank the CPU seconds of its process."""
        return tuple(rank.seconds.get("cpu", 0.0) for rank in self.ranks)

    @property
    def corrected(self) -> float:
        """The step without the longest line for a core, where there is a core for every rank."""
        lines = [rank.seconds.get("line", 0.0) for rank in self.ranks]
        return self.seconds - max(lines) if len(lines) <= _CORES else self.seconds


@dataclass(frozen=True)
class Figure:
    """Seconds of a step.

    Attributes:
        seconds: The median of the quiet steps, else of the least disturbed ones, corrected.
        quiet: Quiet steps it rests on; 0 where it is corrected.
        disturbed: Median share of disturbance in the steps it rests on.
        cpu: Seconds on a core of the busiest rank, median.
        spread: Half of the middle half of the steps' times, relative to `seconds`.
        steps: The steps it rests on.
    """

    seconds: float
    quiet: int
    disturbed: float
    cpu: float
    spread: float
    steps: tuple[Step, ...]


def figure_of(steps: Sequence[Step], enough: int = ENOUGH) -> Figure:
    """The figure that steps make."""
    ranked = sorted(steps, key=lambda s: s.disturbed)
    quiet = [s for s in ranked if s.disturbed < QUIET]
    calm = len(quiet) >= min(enough, len(steps))
    used = quiet if calm else ranked[: max(enough, len(ranked) // 4)]
    times = [s.seconds if calm else s.corrected for s in used]
    median = statistics.median(times)
    return Figure(
        seconds=median,
        quiet=len(quiet) if calm else 0,
        disturbed=statistics.median(s.disturbed for s in used),
        cpu=statistics.median(max(s.cpu) for s in used),
        spread=_half_of_the_middle_half(times) / median if median > 0 else 0.0,
        steps=tuple(used),
    )


def _half_of_the_middle_half(times: Sequence[float]) -> float:
    if len(times) < 2:
        return 0.0
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return (third - first) / 2


def load() -> float:
    """The machine's load average over the last minute."""
    return os.getloadavg()[0]
