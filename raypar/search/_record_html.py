"""How searches look in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypar._plan_html import card_html, table_html
from raypar._plan_text import count_of, duration, size

if TYPE_CHECKING:
    from raypar.search.record import SearchRecord

_MOST_TRIALS = 8


def search_html(record: SearchRecord) -> str:
    """A search: what it did, and its best trials."""
    counts: dict[str, int] = {}
    for trial in record.trials:
        counts[trial.state] = counts.get(trial.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    words = f"{count_of(len(record.trials), 'trial')} in {duration(record.seconds)}: {states}"
    if record.sampler:
        words += f"; sampler {record.sampler}, seed {record.seed}"
    if record.stopped:
        words += f"; ended because {record.stopped}"
    kept = [t for t in record.trials if t.state == "kept" and t.best_s is not None]
    kept.sort(key=lambda t: (t.number != record.winner, t.best_s))
    rows = [
        (
            f"{trial.number}{' (winner)' if trial.number == record.winner else ''}",
            trial.proposer,
            duration(trial.best_s or 0.0),
            size(trial.peak_bytes) if trial.peak_bytes else "",
            trial.words or ", ".join(f"{k}={v}" for k, v in trial.decisions.items()),
        )
        for trial in kept[:_MOST_TRIALS]
    ]
    titles = ("trial", "proposed by", "step", "memory", "plan")
    return card_html(f"Search by {record.planner}", [words], table_html(titles, rows))
