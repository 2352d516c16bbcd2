"""What the page tells of a search: its best trials, and why the others were none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from raypar._plan_text import count_of, duration, size
from raypar.report.page._words import STATE
from raypar.search.record import FIDELITIES, SearchRecord, TrialRecord

_NUMBER = re.compile(r"\d+(\.\d+)?")


def pareto_front(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Kept trials that no other beats in both step time and memory, fastest first."""
    known = [(s, t.peak_bytes, t) for t in trials if t.state == "kept" and t.peak_bytes > 0
             and (s := t.best_s) is not None]  # fmt: skip
    found: list[TrialRecord] = []
    for _, nbytes, trial in sorted(known, key=lambda one: one[:2]):
        if not found or nbytes < found[-1].peak_bytes:
            found.append(trial)
    return found


def best_trials(record: SearchRecord, most: int = 10) -> list[TrialRecord]:
    """The winner, and the fastest other kept trials."""
    kept = [t for t in record.trials if t.state == "kept" and t.best_s is not None]
    kept.sort(key=lambda t: (t.number != record.winner, t.best_s))
    return kept[:most]


def reasons(record: SearchRecord, most: int = 8) -> list[tuple[str, int, str]]:
    """(state, how many trials, why) of those that were not kept, the most frequent first.

    Reasons that differ in their numbers only are one; the first of them is told.
    """
    found: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for trial in record.trials:
        if trial.state != "kept":
            key = (trial.state, _NUMBER.sub("#", trial.reason))
            found[key] += 1
            first.setdefault(key, _short(trial.reason, 300) or "no reason is told")
    return [(key[0], n, first[key]) for key, n in found.most_common(most)]


def profile_words(record: SearchRecord) -> str:
    """How many stages were profiled alone, and why others were not; empty where none was to be."""
    done = sum("profiled" in trial.step_s for trial in record.trials)
    skipped = Counter(t.profile for t in record.trials if t.profile.startswith("skipped: "))
    parts = [f"{count_of(done, 'plan')} had a stage profiled alone"] if done else []
    parts += [
        f"of {count_of(n, 'plan')} no stage was profiled ({text.removeprefix('skipped: ')})"
        for text, n in skipped.most_common()
    ]
    return "; ".join(parts)


def trial_words(trial: TrialRecord) -> str:
    """Everything about a trial, on a few lines."""
    figures = ", ".join(f"{duration(trial.step_s[n])} {n}" for n in FIDELITIES if n in trial.step_s)
    lines = [f"trial {trial.number} by {trial.proposer}: {trial.state} ({STATE[trial.state]})"]
    if figures:
        lines.append(f"step {figures}")
    if trial.peak_bytes:
        share_of = f", {trial.overfull:.0%} of what it may fill" if trial.overfull else ""
        lines.append(f"peak memory {size(trial.peak_bytes)} a device{share_of}")
    if trial.reason:
        lines.append(f"because {_short(trial.reason, 300)}")
    if trial.profile:
        lines.append(f"profile: {_short(trial.profile, 300)}")
    if trial.words:
        lines.append(trial.words)
    if trial.decisions:
        lines.append(_short(decision_words(trial), 400))
    return "\n".join(lines)


def decision_words(trial: TrialRecord) -> str:
    """``stages=4, schedule=1f1b``."""
    return ", ".join(f"{key}={value}" for key, value in trial.decisions.items())


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
