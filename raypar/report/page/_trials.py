"""The search as pictures: step time × memory of every trial, and the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from markupsafe import Markup

from raypar._plan_text import size
from raypar.report.page._record import best_trials, pareto_front, trial_words
from raypar.report.page._svg import Scale, element, grid, labels, share, svg
from raypar.report.page._words import FIDELITY, moment
from raypar.search.record import FIDELITIES, SearchRecord, TrialRecord

_LEAST = 3
"""Trials with a step time below which there is nothing to compare."""
_MOST_DOTS = 600
_COLOURS = 8
"""Proposers that have a colour of their own; further ones share the last."""
_FAR = 2.5
"""Times the best step time beyond which trials lie at the end of the time axis: where the others
are is what one wants to see."""
_HEIGHT, _STRIP, _PROGRESS_HEIGHT = 340, 46, 220
SHAPES = {
    "quick": "circle",
    "simulated": "square",
    "learned": "triangle",
    "profiled": "diamond",
    "measured": "star",
}
"""Fidelity of a trial's best figure → shape of its dot."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with the texts of its axes."""

    drawing: Markup
    x_axis: Markup
    y_axis: Markup


@dataclass(frozen=True, slots=True)
class TrialPlots:
    """The pictures of a search.

    Attributes:
        pareto: Step time × peak memory.
        strip: Trials that have no place in it, or None where all have.
        progress: Step time over trials, with the best so far.
        proposers: (name, style class) of all who proposed.
        fidelities: (name, shape, meaning) of those that were reached.
        tips: Trial number → hover text; in the page as data, once for all dots of a trial.
        notes: What is not drawn, or not where it would be expected, in words.
    """

    pareto: Plot
    strip: Markup | None
    progress: Plot
    proposers: list[tuple[str, str]]
    fidelities: list[tuple[str, str, str]]
    tips: dict[int, str]
    notes: list[str]


def trial_plots(record: SearchRecord) -> TrialPlots | None:
    """Draws a search; None where too few trials have a step time.

    Args:
        record: What the search did.
    """
    shown = _shown(record)
    if sum(t.best_s is not None for t in shown) < _LEAST:
        return None
    pen = _Pen(record, shown)
    counts = Counter(t.proposer for t in record.trials)
    return TrialPlots(
        pareto=pen.pareto(),
        strip=pen.strip(),
        progress=pen.progress(),
        proposers=[(f"{name} ({counts[name]})", style) for name, style in pen.styles.items()],
        fidelities=[
            (n, SHAPES[n], FIDELITY[n]) for n in FIDELITIES if any(n in t.step_s for t in shown)
        ],
        tips={t.number: trial_words(t) for t in shown},
        notes=pen.notes(),
    )


def _shown(record: SearchRecord) -> list[TrialRecord]:
    """All trials, or the best half and an even share of the others."""
    trials = record.trials
    if len(trials) <= _MOST_DOTS:
        return list(trials)
    best = {t.number for t in pareto_front(trials)} | {record.winner}
    best |= {t.number for t in best_trials(record, _MOST_DOTS // 2)}
    others = [t for t in trials if t.number not in best]
    room = max(0, _MOST_DOTS - len(best))
    even = {others[i * len(others) // room].number for i in range(room)} if others else set()
    return [t for t in trials if t.number in best | even]


class _Pen:
    """Draws the trials of one record, alike in all pictures."""

    def __init__(self, record: SearchRecord, shown: Sequence[TrialRecord]) -> None:
        self.record, self.shown = record, shown
        self.timed = [(t, s) for t in shown if (s := t.best_s) is not None]
        names = [name for name, _ in Counter(t.proposer for t in record.trials).most_common()]
        self.styles = {name: f"p{min(i, _COLOURS - 1)}" for i, name in enumerate(names)}
        self.front = pareto_front(record.trials)

    @cached_property
    def far_s(self) -> float:
        """Seconds beyond which trials lie at the end of the time axis."""
        kept = [s for t, s in self.timed if t.state == "kept"]
        return _FAR * min(kept or [s for _, s in self.timed])

    @cached_property
    def time(self) -> Scale:
        """The axis of step times, of all pictures: all but hopeless trials, and the bound."""
        bound = [self.record.bound_s] if self.record.bound_s > 0 else []
        return Scale.around([*(s for _, s in self.timed if s <= self.far_s), *bound])

    def notes(self) -> list[str]:
        """What is not where it would be expected, in words."""
        far = sum(s > self.far_s for _, s in self.timed)
        found = []
        if len(self.shown) < len(self.record.trials):
            found.append(
                f"{len(self.shown)} of {len(self.record.trials)} trials are drawn: the best ones, "
                "and every so manyth of the others."
            )
        if far:
            found.append(
                f"What takes more than {_FAR:g} times the best lies at the end of the axis of step "
                f"times ({far})."
            )
        return found

    def pareto(self) -> Plot:
        """Step time × peak memory of all trials that have both."""
        placed = [(t, s) for t, s in self.timed if t.peak_bytes > 0]
        y = Scale.around([float(t.peak_bytes) for t, _ in placed] or [1.0, 2.0])
        corners = [
            (share(self.time.place(t.best_s or 0.0)), share(1 - y.place(t.peak_bytes)))
            for t in self.front
        ]
        lines = []
        for (x1, y1), (x2, y2) in pairwise(corners):
            lines.append(element("line", x1=x1, x2=x2, y1=y1, y2=y1, class_="front-line"))
            lines.append(element("line", x1=x2, x2=x2, y1=y1, y2=y2, class_="front-line"))
        marked = {t.number for t in self.front}
        dots = [
            self._dot(t, share(self.time.place(s)), share(1 - y.place(t.peak_bytes)), marked)
            for t, s in self._on_top(placed)
        ]
        drawing = svg(
            [grid(self.time, y), *self._bound(upwards=False), *lines, *dots],
            height=_HEIGHT,
            title="Step time and peak memory of every trial",
        )
        return Plot(drawing, labels(self.time, moment), labels(y, size, upwards=True))

    def strip(self) -> Markup | None:
        """Trials without a place: by their step time where they have one, else in order."""
        trials = [t for t in self.shown if t.best_s is None or t.peak_bytes <= 0]
        if not trials:
            return None
        rows, untimed, before = 3, sum(t.best_s is None for t in trials), 0
        parts = []
        for i, trial in enumerate(trials):
            if trial.best_s is None:
                at, before = (before + 0.5) / untimed, before + 1
            else:
                at = self.time.place(trial.best_s)
            parts.append(self._dot(trial, share(at), f"{8 + 15 * (i % rows)}"))
        title = f"{len(trials)} trials without step time or memory"
        return svg(parts, height=_STRIP, title=title)

    def progress(self) -> Plot:
        """Every trial's step time by its number, and a line for the best kept one so far."""
        x = Scale(-0.5, max(t.number for t in self.record.trials) + 0.5)
        places = {
            t.number: (share(x.place(t.number)), 1 - self.time.place(s)) for t, s in self.timed
        }
        lines: list[Markup] = []
        best: tuple[str, float] | None = None
        for trial, _ in self.timed:
            at, height = places[trial.number]
            if trial.state == "kept" and (best is None or height > best[1]):
                lines += _step(*best, at, height) if best else []
                best = (at, height)
        lines += _step(*best, "100%", best[1]) if best else []
        dots = [
            self._dot(t, places[t.number][0], share(places[t.number][1]))
            for t, _ in self._on_top(self.timed)
        ]
        drawing = svg(
            [grid(x, self.time), *self._bound(upwards=True), *lines, *dots],
            height=_PROGRESS_HEIGHT,
            title="Step time of every trial, and the best so far",
        )
        numbers = labels(x, lambda n: f"{n:.0f}", most=8)
        return Plot(drawing, numbers, labels(self.time, moment, upwards=True, most=5))

    def _on_top(
        self, timed: Sequence[tuple[TrialRecord, float]]
    ) -> list[tuple[TrialRecord, float]]:
        """Kept trials after others, the front and the winner last: what comes last is on top."""
        front = {t.number for t in self.front}

        def rank(pair: tuple[TrialRecord, float]) -> tuple[bool, bool, bool]:
            number = pair[0].number
            return number == self.record.winner, number in front, pair[0].state == "kept"

        return sorted(timed, key=rank)

    def _dot(self, trial: TrialRecord, x: str, y: str, front: Collection[int] = ()) -> Markup:
        reached = [n for n in FIDELITIES if n in trial.step_s]
        words = [self.styles[trial.proposer] if trial.state == "kept" else f"s-{trial.state}"]
        if trial.number == self.record.winner:
            words.append("winner")
        elif trial.number in front:
            words.append("front")
        shape = f"#dot-{SHAPES[reached[-1]] if reached else 'cross'}"
        return element("use", href=shape, x=x, y=y, class_=" ".join(words), data_i=trial.number)

    def _bound(self, *, upwards: bool) -> list[Markup]:
        """The lower bound as a line."""
        bound = self.record.bound_s
        if bound <= 0:
            return []
        at = self.time.place(bound)
        ends = {"x1": share(at), "x2": share(at), "y1": "0", "y2": "100%"}
        if upwards:
            ends = {"x1": "0", "x2": "100%", "y1": share(1 - at), "y2": share(1 - at)}
        words = f"lower bound: no plan takes less than {moment(bound)} a step under this cost model"
        return [element("line", class_="bound", data_t=words, **ends)]


def _step(x1: str, y1: float, x2: str, y2: float) -> list[Markup]:
    across = element("line", x1=x1, x2=x2, y1=share(y1), y2=share(y1), class_="best-line")
    down = element("line", x1=x2, x2=x2, y1=share(y1), y2=share(y2), class_="best-line")
    return [across, *([down] if y1 != y2 else [])]
