"""Interleaved timing: systems take turns, and ratios are taken within a round.

A machine's speed drifts by more than the differences of interest. Systems that run in the same
round see nearly the same machine, so the median of the rounds' ratios is steadier than the ratio
of medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Timing:
    """What some steps took.

    Attributes:
        seconds: Wall time of one step, the mean over the steps.
        losses: Loss of every step.
        cpu_seconds: CPU time of one step in the busiest process, where it is known.
    """

    seconds: float
    losses: list[float]
    cpu_seconds: float | None = None


class System(Protocol):
    """Something that trains a few steps when told to, and is idle otherwise."""

    name: str

    def steps(self, count: int) -> Timing: ...

    def close(self) -> None: ...


@dataclass
class Rounds:
    """Seconds per step of every system, round by round."""

    names: tuple[str, ...]
    seconds: list[dict[str, float]] = field(default_factory=list)

    def ratios(self, ours: str, theirs: str) -> list[float]:
        """Ours ÷ theirs, one per round."""
        return [r[ours] / r[theirs] for r in self.seconds]

    def ratio(self, ours: str, theirs: str) -> float:
        """Median over the rounds of ours ÷ theirs."""
        return statistics.median(self.ratios(ours, theirs))

    def median(self, name: str) -> float:
        """Median seconds per step."""
        return statistics.median(r[name] for r in self.seconds)

    def spread(self, name: str) -> float:
        """Interquartile range of the seconds per step, as a share of their median."""
        values = sorted(r[name] for r in self.seconds)
        if len(values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / statistics.median(values)

    def fastest(self, names: Sequence[str]) -> str:
        """The one of `names` with the least median."""
        return min(names, key=self.median)


def alternate(
    systems: Sequence[System],
    rounds: int,
    steps: int,
    on_round: Callable[[dict[str, float]], None] | None = None,
) -> Rounds:
    """Lets every system run `steps` steps in each round, the first one moving on by one."""
    result = Rounds(tuple(s.name for s in systems))
    for index in range(rounds):
        turn = index % len(systems)
        order = [*systems[turn:], *systems[:turn]]
        row = {system.name: system.steps(steps).seconds for system in order}
        result.seconds.append(row)
        if on_round is not None:
            on_round(row)
    return result


def first_losses(systems: Sequence[System], steps: int, tolerance: float) -> list[float]:
    """Warms every fresh system up, and checks that they train the same model.

    Raises:
        RuntimeError: The losses of two systems differ by more than `tolerance`.
    """
    found = {system.name: system.steps(steps).losses for system in systems}
    (first, reference), *others = found.items()
    for name, losses in others:
        gaps = [abs(a - b) for a, b in zip(reference, losses, strict=True)]
        if not all(gap <= tolerance for gap in gaps):  # also false for a NaN
            raise RuntimeError(
                f"{name} trains something else than {first}: losses {losses} against {reference} "
                f"(allowed gap {tolerance:.0e})"
            )
    return reference
