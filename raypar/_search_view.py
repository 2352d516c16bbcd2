"""A search as its user sees it while it goes on: one live line on a terminal, else a few lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

import click

from raypar._plan_text import count_of, duration

if TYPE_CHECKING:
    from rich.live import Live

    from raypar.search.progress import Clock
    from raypar.search.record import SearchRecord, TrialRecord

_QUIET_S = 10.0
"""Without a terminal, seconds after which a line is written though nothing got better."""


class SearchView:
    """Tells of every trial; a context manager around the search.

    Args:
        live: Whether one line is drawn anew all the time; default: where stderr is a terminal.
        clock: Seconds.
    """

    def __init__(self, live: bool | None = None, clock: Clock = time.monotonic) -> None:
        from raypar.search.progress import SoFar

        self._clock: Clock = clock
        self._so_far = SoFar(clock)
        self._last = clock()
        self._best_number = -1
        self._live: Live | None = None
        if live is None:
            live = sys.stderr.isatty()
        if live:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, refresh_per_second=8)

    def __enter__(self) -> SearchView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, trial: TrialRecord, best: TrialRecord | None) -> None:
        """Tells of one trial; see `raypar.search.plan.Progress`."""
        line = self._so_far.line(trial, best)
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(line, overflow="ellipsis", no_wrap=True))
            return
        number = -1 if best is None else best.number
        now = self._clock()
        if number != self._best_number or now - self._last >= _QUIET_S:
            self._best_number, self._last = number, now
            click.echo(line, err=True)


def ended(record: SearchRecord) -> list[str]:
    """How a search ended: who found the plan, after how much, and what its user should know."""
    lines = []
    if record.sampler:
        parts = [
            f"searched {count_of(len(record.trials), 'trial')} in {duration(record.seconds)}",
            f"the plan was proposed by {record.proposer}" if record.proposer else "",
            record.stopped,
        ]
        lines.append("; ".join(part for part in parts if part))
    return lines + [f"note: {note}" for note in record.notes]
