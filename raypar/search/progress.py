"""How far a search is, in words."""

from __future__ import annotations

import time
from collections.abc import Callable

from raypar._plan_text import count_of, duration
from raypar.search.record import TrialRecord

Clock = Callable[[], float]


class SoFar:
    """Puts what a search has found so far into a line; told of every trial.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._trials = 0

    def line(self, trial: TrialRecord, best: TrialRecord | None) -> str:
        """The line after a trial; see `raypar.search.plan.Progress`."""
        self._trials = max(self._trials, trial.number + 1)
        spent = self._clock() - self._began
        parts = [f"{count_of(self._trials, 'trial')} in {spent:.0f} s"]
        step_s = None if best is None else best.best_s
        if best is None or step_s is None:
            parts.append("no plan yet")
        else:
            parts.append(f"best step {duration(step_s)} by {best.proposer}: {best.words}")
        if best is None or trial.number != best.number:
            parts.append(f"now {trial.proposer}: {trial.state}")
        return "; ".join(parts)
