"""Plans that could be the best really run: where it is unsure, and where it could pay.

A correction of the simulated step (`raypar.search.cost.step_correction`) is learned from what is
measured on the way. The next plan to run is the one with the largest expected improvement over the
best measured one (Jones et al. 1998, "Efficient Global Optimization", section 4.1), so that plans
that are surely slower are never run; before that, one of each kind of plan that could win is run.
At the end the best few run once more, in turns.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace

from raypar.errors import RayparError
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.cost.rows import StepRow
from raypar.search.cost.step_correction import StepCorrection
from raypar.search.interop.contest import in_words
from raypar.search.measure import Measured, Measurer
from raypar.search.study.judge import Judge, Outcome
from raypar.search.study.ledger import Ledger
from raypar.search.study.profiles import Profiles, error_words

_MEASURED = 12
"""Plans that are run where the options do not say how many."""
_STEPS, _LEAST_S, _MOST_S = 8, 0.5, 20.0
"""How long a plan runs: so many predicted steps, within these seconds."""
_GAIN = 0.003
"""Expected relative improvement below which nothing more is run."""
_UNLIKE = 1.6
"""Kinds of plans are tried that are predicted to take up to so many times the least."""
_FINALISTS, _NEAR = 3, 1.1
_ROUNDS = 2.0
"""How much longer finalists run, together, than each plan did alone."""


class Finals:
    """Runs plans of a search.

    Args:
        judge: Looks at plans.
        ledger: What was looked at.
        measurer: Runs them; None: predictions decide.
        config: How many may run.
        profiles: Profiles a stage of a plan before it runs; None: none is.

    Attributes:
        seconds: What measuring took so far.
        notes: Plans that did not run, and why.
    """

    def __init__(
        self,
        judge: Judge,
        ledger: Ledger,
        measurer: Measurer | None,
        config: SearchConfig,
        profiles: Profiles | None = None,
    ) -> None:
        self.judge = judge
        self.ledger = ledger
        self.measurer = measurer
        self.profiles = profiles
        self.seconds = 0.0
        self.notes: list[str] = []
        self._most = _MEASURED if config.measure == "auto" else config.measure
        self._measured: dict[int, float] = {}
        self._together: dict[int, float] = {}
        self._ran = 0
        self._rows: dict[int, StepRow] = {}
        self._failed: set[int] = set()
        self._correction = StepCorrection()

    @property
    def on(self) -> bool:
        """Whether anything is to be measured."""
        return self.measurer is not None and self._most > 0

    @property
    def winner(self) -> int:
        """Number of the trial with the best plan that did not fail to run; -1: there is none."""
        known = self._together or self._measured
        if known:
            return min(known, key=lambda n: known[n])
        if not self._failed:
            return self.ledger.best_number
        return min(
            self._candidates(), key=lambda n: self.ledger.outcomes[n].predicted_s, default=-1
        )

    @property
    def failed(self) -> int:
        """Plans that did not run."""
        return len(self._failed)

    def expected_s(self, outcome: Outcome) -> float:
        """Predicted seconds of a step, corrected by what was measured."""
        return outcome.predicted_s * self._correction.predict(outcome.features)[0]

    def measure(self, left_s: float, *, share: float = 1.0) -> dict[int, float]:
        """Runs plans as long as one may improve on the best.

        Args:
            left_s: Seconds that are left.
            share: Of the plans that may run, at most so many have run when this ends.

        Returns:
            Number of the trial → measured seconds of a step, for what ran now.
        """
        found: dict[int, float] = {}
        while self._ran < math.ceil(self._most * share):
            number = self._next()
            if number is None:
                break
            if self._sharpened(number, share):
                left_s -= self.profiles.last_s if self.profiles else 0.0
                continue  # what is to run next is another question now
            seconds = self._seconds(self.ledger.outcomes[number])
            if self._measured and self.seconds > 0 and left_s < seconds:
                break
            before, began = self.seconds, time.perf_counter()
            step_s = self._run(number, seconds)
            left_s -= max(self.seconds - before, time.perf_counter() - began)
            if step_s is not None:
                found[number] = step_s
        return found

    def _sharpened(self, number: int, share: float) -> bool:
        """Profiles a stage of what is to run; whether predictions are others now."""
        if self.profiles is None or not self.profiles.look(number, share=share):
            return False
        # Corrections are of what is predicted: what is learned of a stage must not count twice.
        self.profiles.refresh(self._measured)
        outcomes = self.ledger.outcomes
        for measured, row in self._rows.items():
            self._rows[measured] = replace(row, simulated_s=outcomes[measured].predicted_s)
        self._correction = StepCorrection.fit(list(self._rows.values()))
        return True

    def _next(self) -> int | None:
        """The trial whose plan is to run next; None where none can pay."""
        candidates = self._candidates()
        if not candidates:
            return None
        if not self._measured:
            return min(candidates, key=lambda n: self.ledger.outcomes[n].predicted_s)
        if (new := self._unlike(candidates)) is not None:
            return new
        best = min(self._measured.values())
        gains = {n: self._improvement(self.ledger.outcomes[n], best) for n in candidates}
        number = max(gains, key=lambda n: gains[n])
        return number if gains[number] >= _GAIN * best else None

    def _unlike(self, candidates: list[int]) -> int | None:
        """The most promising plan of a kind of which none has run; None where all have.

        How far simulated steps are off differs most between kinds of plans, so that nothing is
        known of one that was never run.
        """
        seen = {self._kind(n) for n in (*self._measured, *self._failed)}
        outcomes = self.ledger.outcomes
        limit = _UNLIKE * min(outcomes[n].predicted_s for n in (*candidates, *self._measured))
        new = [
            n for n in candidates
            if self._kind(n) not in seen and outcomes[n].predicted_s <= limit
        ]  # fmt: skip
        return min(new, key=lambda n: outcomes[n].predicted_s, default=None)

    def _kind(self, number: int) -> tuple[object, ...]:
        plan = self.ledger.outcomes[number].plan
        assert plan is not None
        groups = len({group for group, _ in plan.schedule.placement})
        return (
            groups > 1 and plan.schedule.name,
            len(plan.stages) > groups,
            plan.replicas > 1,
            any(stage.mesh.inner for stage in plan.stages),
            any(stage.memory.zero for stage in plan.stages),
        )

    def _candidates(self) -> list[int]:
        """Trials with plans that fit and have not run; of equal plans the first."""
        seen = {self._text(n) for n in (*self._measured, *self._failed)}
        found: dict[str, int] = {}
        for number, outcome in self.ledger.outcomes.items():
            if outcome.state == "kept":
                text = self._text(number)
                if text not in seen:
                    found.setdefault(text, number)
        return list(found.values())

    def _text(self, number: int) -> str:
        """Equal for plans that do the same."""
        plan = self.ledger.outcomes[number].plan
        assert plan is not None
        # One microbatch on one stage leaves no order to choose.
        alone = len(plan.stages) == plan.microbatches == 1
        schedule = "" if alone else repr(plan.schedule)
        return repr((plan.microbatches, schedule, [_form(plan, i) for i in _stages(plan)]))

    def _improvement(self, outcome: Outcome, best: float) -> float:
        """Expected seconds by which a plan is faster than the best, if its log is normal."""
        factor, sigma = self._correction.predict(outcome.features)
        mean = math.log(outcome.predicted_s * factor)
        gap = (math.log(best) - mean) / sigma
        below = 0.5 * math.erfc(-gap / math.sqrt(2))
        shifted = 0.5 * math.erfc(-(gap - sigma) / math.sqrt(2))
        return best * below - math.exp(mean + sigma**2 / 2) * shifted

    def _seconds(self, outcome: Outcome) -> float:
        return min(max(_STEPS * self.expected_s(outcome), _LEAST_S), _MOST_S)

    def _run(self, number: int, seconds: float) -> float | None:
        """Runs one plan; None if it did not run."""
        assert self.measurer is not None
        outcome = self.ledger.outcomes[number]
        assert outcome.plan is not None
        self._ran += 1
        try:
            measured = _usable(self.measurer.measure(outcome.plan, seconds=seconds))
        except Exception as error:  # of whatever kind: what was searched so far is worth more
            self.notes.append(
                f"a plan did not run ({in_words(outcome.plan)}): {error_words(error)}"
            )
            self._give_up(number, error)
            return None
        self.seconds += measured.took_s
        self._take(number, measured)
        self.ledger.note_measured(number, measured.step_s, measured.took_s)
        return measured.step_s

    def _give_up(self, number: int, error: Exception) -> None:
        """Leaves a plan that did not run out of the search."""
        self._failed.add(number)
        text = self._text(number)
        kept = [n for n, outcome in self.ledger.outcomes.items() if outcome.state == "kept"]
        same = {number, *(n for n in kept if self._text(n) == text)}
        self.ledger.note_failed(same, f"it did not run: {error_words(error)}")

    def _take(self, number: int, measured: Measured) -> None:
        """Learns from a measurement."""
        self._measured[number] = measured.step_s
        self._rows[number] = self.judge.observe(self.ledger.outcomes[number], measured)
        self._correction = StepCorrection.fit(list(self._rows.values()))

    def decide(self, left_s: float = math.inf) -> None:
        """Lets the best few run again, in turns, and keeps what that says of them.

        Args:
            left_s: Seconds that are left: finalists that they do not suffice for stay as they are.
        """
        if self.measurer is None or len(self._measured) < 2:
            return
        ranked = sorted(self._measured, key=lambda n: self._measured[n])
        best = self._measured[ranked[0]]
        close = [n for n in ranked[:_FINALISTS] if self._measured[n] <= _NEAR * best]
        seconds = _ROUNDS * max(self._seconds(self.ledger.outcomes[n]) for n in close)
        if len(close) < 2 or seconds * len(close) > left_s:
            return
        plans: list[Plan] = []
        for number in close:
            plan = self.ledger.outcomes[number].plan
            assert plan is not None
            plans.append(plan)
        try:
            answers = self.measurer.measure_together(plans, seconds=seconds)
        except Exception as error:
            self.notes.append(f"the best plans did not run a second time: {error_words(error)}")
            return
        for number, found in zip(close, answers, strict=True):
            try:
                again = _usable(found)
            except Exception as error:
                del self._measured[number]
                self.notes.append(f"a plan did not run a second time: {error_words(error)}")
                self._give_up(number, error)
                continue
            self.seconds += again.took_s
            self._together[number] = again.step_s
            self.ledger.note_measured(number, again.step_s, again.took_s)


def _usable(found: Measured | Exception) -> Measured:
    """A measurement that says something.

    Raises:
        Exception: What is given instead of one.
        RayparError: Its step takes no time, or no finite one.
    """
    if isinstance(found, Exception):
        raise found
    if not (math.isfinite(found.step_s) and found.step_s > 0):
        raise RayparError(f"it was measured at {found.step_s} s a step")
    return found


def _stages(plan: Plan) -> range:
    return range(len(plan.stages))


def _form(plan: Plan, index: int) -> tuple[object, ...]:
    stage = plan.stages[index]
    return stage.first, stage.last, stage.mesh, stage.memory, tuple(sorted(stage.sharding.items()))
