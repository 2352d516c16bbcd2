"""Everything that a search has looked at: who is best so far, and what can still win."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from raypar.search.interop.contest import in_words
from raypar.search.plan import Progress
from raypar.search.record import TrialRecord
from raypar.search.study.judge import Outcome
from raypar.search.study.space import Decisions

_SURE = 5
"""Trials that were simulated before cheap figures may rule others out."""
_MOST_ALTERNATIVES = 8


class Ledger:
    """Trials in order.

    Args:
        gain: Relative gain that counts as one.
        progress: Is told of every trial.
        slack: Cheap figures rule out what is so many times slower than the best.

    Attributes:
        trials: Their records.
        outcomes: What became of them, by number.
        idle: Trials since the last gain.
    """

    def __init__(self, gain: float, progress: Progress | None = None, slack: float = 1.1) -> None:
        self._slack = slack
        self.trials: list[TrialRecord] = []
        self.outcomes: dict[int, Outcome] = {}
        self.idle = 0
        self._gain = gain
        self._progress = progress
        self._best: int | None = None

    def add(self, proposer: str, decisions: Decisions | None, outcome: Outcome) -> TrialRecord:
        """Writes a trial down."""
        number = len(self.trials)
        record = outcome.record(number, proposer, decisions)
        self.trials.append(record)
        self.outcomes[number] = outcome
        before = self.best
        if outcome.state == "kept" and (before is None or outcome.predicted_s < before.predicted_s):
            self._best = number
            gained = before is None or outcome.predicted_s < before.predicted_s * (1 - self._gain)
            self.idle = 0 if gained else self.idle + 1
        else:
            self.idle += 1
        if self._progress is not None:
            best = None if self._best is None else self.trials[self._best]
            self._progress(record, best)
        return record

    def note_measured(self, number: int, step_s: float, seconds: float) -> None:
        """Writes down what steps of a trial's plan really took."""
        record = self.trials[number]
        record = replace(
            record,
            step_s={**record.step_s, "measured": step_s},
            seconds=record.seconds + seconds,
            measured_s=record.measured_s + seconds,
        )
        self.trials[number] = record
        if self._progress is not None:
            self._progress(record, record)

    def note_failed(self, numbers: Collection[int], reason: str) -> None:
        """Writes down that the plan of trials did not run: it is not the best then."""
        for number in numbers:
            self.trials[number] = replace(self.trials[number], state="failed", reason=reason)
            self.outcomes[number] = replace(self.outcomes[number], state="failed", reason=reason)
        self._find_best()

    def note_predicted(self, number: int, outcome: Outcome) -> None:
        """Writes down what is predicted of a trial's plan now."""
        self.outcomes[number] = outcome
        record = self.trials[number]
        self.trials[number] = replace(
            record,
            step_s={**record.step_s, **outcome.step_s},
            state=outcome.state,
            reason=outcome.reason,
            peak_bytes=outcome.peak_bytes,
            overfull=outcome.overfull,
        )
        self._find_best()

    def note_pruned(self, number: int, reason: str) -> None:
        """Writes down that a trial's plan fell behind once more was known of it."""
        for noted in (self.trials, self.outcomes):
            noted[number] = replace(noted[number], state="pruned", reason=reason)  # type: ignore
        self._find_best()

    def note_profile(self, number: int, words: str, seconds: float = 0.0) -> None:
        """Writes down what profiling a stage of a trial's plan said, or why that was not done."""
        record = self.trials[number]
        record = replace(
            record,
            profile=words,
            seconds=record.seconds + seconds,
            measured_s=record.measured_s + seconds,
        )
        self.trials[number] = record
        if self._progress is not None and self._best is not None:
            self._progress(record, self.trials[self._best])

    def _find_best(self) -> None:
        kept = [n for n, outcome in self.outcomes.items() if outcome.state == "kept"]
        self._best = min(kept, key=lambda n: self.outcomes[n].predicted_s, default=None)

    @property
    def best(self) -> Outcome | None:
        """The fastest by prediction that fits."""
        return None if self._best is None else self.outcomes[self._best]

    @property
    def best_number(self) -> int:
        """Its number; -1 where there is none."""
        return -1 if self._best is None else self._best

    def limits(self) -> Mapping[str, float]:
        """Fidelity → step time beyond which a plan cannot win, as far as figures have agreed."""
        both = [
            (o.step_s["quick"], o.predicted_s)
            for o in self.outcomes.values()
            if o.state == "kept" and "quick" in o.step_s
        ]
        if self.best is None or len(both) < _SURE:
            return {}
        over = max(quick / exact for quick, exact in both)
        best = self.best.predicted_s
        return {"quick": best * over * self._slack, "simulated": best * self._slack}

    def alternatives(self, chosen: Outcome) -> dict[str, float]:
        """The best other plans in words → their predicted step, in seconds of the chosen plan.

        Trials are compared by the best model that was asked, and a plan tells what its simulation
        says: the figures are brought to its scale, so that what each loses is what was compared.
        """
        assert chosen.plan is not None
        scale = chosen.plan.predicted.get("step_s", chosen.predicted_s) / chosen.predicted_s
        own = in_words(chosen.plan)
        named: dict[str, float] = {}
        kept = [o for o in self.outcomes.values() if o.state == "kept" and o.plan is not None]
        for outcome in sorted(kept, key=lambda o: o.predicted_s):
            assert outcome.plan is not None
            text = in_words(outcome.plan)
            if text != own:
                named.setdefault(text, scale * outcome.predicted_s)
        return dict(list(named.items())[:_MOST_ALTERNATIVES])
