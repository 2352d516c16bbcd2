"""The search as pictures: step time × memory of every trial, and the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from raypar._plan_text import duration, size
from raypar.report.page._record import best_trials, pareto_front, trial_words
from raypar.report.page._svg import Scale, element, grid, labels, share, svg
from raypar.report.page._words import FIDELITY
from raypar.search.record import FIDELITIES, SearchRecord, TrialRecord

_MOST_DOTS = 600
_COLOURS = 8
"""Proposers that have a colour of their own; further ones share the last."""
_HEIGHT, _STRIP = 340, 46
_PROGRESS_HEIGHT = 220
SHAPES = {"quick": "circle", "simulated": "square", "learned": "triangle", "measured": "star"}
"""Fidelity of a trial's best figure → shape of its dot."""


@dataclass(frozen=True, slots=True)
class TrialPlots:
    """The pictures of a search.

    Attributes:
        pareto: Step time × peak memory.
        pareto_x: Texts of its time axis.
        pareto_y: Texts of its axis of bytes.
        strip: Trials that have no place in it, or None where all have.
        progress: Step time over trials, with the best so far.
        progress_x: Texts of its axis of trials.
        progress_y: Texts of its time axis.
        proposers: (name, style class) of all who proposed.
        fidelities: (name, shape, meaning) of those that were reached.
        tips: Trial number → hover text; in the page as data, once for all dots of a trial.
        left_out: What is not drawn, in words.
    """

    pareto: Markup
    pareto_x: Markup
    pareto_y: Markup
    strip: Markup | None
    progress: Markup
    progress_x: Markup
    progress_y: Markup
    proposers: list[tuple[str, str]]
    fidelities: list[tuple[str, str, str]]
    tips: dict[int, str]
    left_out: str


def trial_plots(record: SearchRecord) -> TrialPlots | None:
    """Draws a search; None where no trial has a step time.

    Args:
        record: What the search did.
    """
    chosen = _shown(record)
    timed = [(t, s) for t in chosen if (s := t.best_s) is not None and s > 0]
    if not timed:
        return None
    counts = Counter(t.proposer for t in record.trials)
    names = [name for name, _ in counts.most_common()]
    style = {name: f"p{min(i, _COLOURS - 1)}" for i, name in enumerate(names)}
    bound = [record.bound_s] if record.bound_s > 0 else []
    kept = [s for t, s in timed if t.state == "kept"] or [s for _, s in timed]
    x = Scale.around([*_without_far([s for _, s in timed], min(kept)), *bound])
    placed = [(t, s) for t, s in timed if t.peak_bytes > 0]
    y = Scale.around([float(t.peak_bytes) for t, _ in placed] or [1.0, 2.0])
    best = {t.number for t in pareto_front(record.trials)}
    homeless = [t for t in chosen if t.best_s is None or t.peak_bytes <= 0]
    dots = [_dot(t, share(x.place(s)), share(1 - y.place(t.peak_bytes)), style, record, best)
            for t, s in placed]  # fmt: skip
    progress_x = Scale.around([-0.5, max(t.number for t in record.trials) + 0.5], room=0.0)
    return TrialPlots(
        pareto=svg(
            [grid(x, y), *_bound(record, x, upwards=False), *_front(record, x, y), *dots],
            height=_HEIGHT,
            title="Step time and peak memory of every trial",
            class_="trials",
        ),
        pareto_x=labels(x, duration),
        pareto_y=labels(y, size, upwards=True),
        strip=_strip(homeless, x, style, record) if homeless else None,
        progress=_progress(timed, progress_x, x, style, record),
        progress_x=labels(progress_x, lambda n: f"{n:.0f}", most=8),
        progress_y=labels(x, duration, upwards=True, most=5),
        proposers=[(f"{n} ({counts[n]})", style[n]) for n in names],
        fidelities=[
            (n, SHAPES[n], FIDELITY[n]) for n in FIDELITIES if any(n in t.step_s for t in chosen)
        ],
        tips={t.number: trial_words(t) for t in chosen},
        left_out=""
        if len(chosen) == len(record.trials)
        else f"{len(chosen)} of {len(record.trials)} trials are drawn: the best ones, and every so "
        "manyth of the others",
    )


def _shown(record: SearchRecord) -> list[TrialRecord]:
    """All trials, or the best half and an even share of the others."""
    trials = record.trials
    if len(trials) <= _MOST_DOTS:
        return list(trials)
    front = {t.number for t in pareto_front(trials)} | {record.winner}
    front |= {t.number for t in best_trials(record, _MOST_DOTS // 2)}
    others = [t for t in trials if t.number not in front]
    step = len(others) / max(1, _MOST_DOTS - len(front))
    even = {others[int(i * step)].number for i in range(max(0, _MOST_DOTS - len(front)))}
    return [t for t in trials if t.number in front | even]


def _without_far(seconds: Sequence[float], best: float) -> list[float]:
    """What the time axis must show: not what takes more than 100 times the best."""
    return [s for s in seconds if s <= 100 * best]


def _dot(
    trial: TrialRecord,
    x: str,
    y: str,
    style: dict[str, str],
    record: SearchRecord,
    best: set[int],
) -> Markup:
    reached = [n for n in FIDELITIES if n in trial.step_s]
    words = [style[trial.proposer] if trial.state == "kept" else f"s-{trial.state}"]
    if trial.number == record.winner:
        words.append("winner")
    elif trial.number in best:
        words.append("front")
    shape = SHAPES[reached[-1]] if reached else "cross"
    return element(
        "use", href=f"#dot-{shape}", x=x, y=y, class_=" ".join(words), data_i=trial.number
    )


def _bound(record: SearchRecord, scale: Scale, *, upwards: bool) -> list[Markup]:
    """The lower bound as a line."""
    if record.bound_s <= 0:
        return []
    at = share(1 - scale.place(record.bound_s) if upwards else scale.place(record.bound_s))
    ends = {"x1": "0", "x2": "100%", "y1": at, "y2": at}
    if not upwards:
        ends = {"x1": at, "x2": at, "y1": "0", "y2": "100%"}
    text = (
        f"lower bound: no plan takes less than {duration(record.bound_s)} a step under this cost "
        "model"
    )
    return [element("line", class_="bound", data_t=text, **ends)]


def _front(record: SearchRecord, x: Scale, y: Scale) -> list[Markup]:
    """The Pareto front as a staircase."""
    corners = [
        (share(x.place(t.best_s or 0.0)), share(1 - y.place(t.peak_bytes)))
        for t in pareto_front(record.trials)
    ]
    lines = []
    for (x1, y1), (x2, y2) in pairwise(corners):
        lines.append(element("line", x1=x1, x2=x2, y1=y1, y2=y1, class_="front-line"))
        lines.append(element("line", x1=x2, x2=x2, y1=y1, y2=y2, class_="front-line"))
    return lines


def _strip(
    trials: Sequence[TrialRecord], x: Scale, style: dict[str, str], record: SearchRecord
) -> Markup:
    """Trials without a place: by their step time where they have one, else in order."""
    rows, untimed, before = 3, sum(t.best_s is None for t in trials), 0
    parts = []
    for i, trial in enumerate(trials):
        seconds = trial.best_s
        if seconds is None:
            at, before = (before + 0.5) / untimed, before + 1
        else:
            at = x.place(seconds)
        parts.append(_dot(trial, share(at), f"{8 + 15 * (i % rows)}", style, record, set()))
    title = f"{len(trials)} trials without step time or memory"
    return svg(parts, height=_STRIP, title=title, class_="trials")


def _progress(
    timed: Sequence[tuple[TrialRecord, float]],
    x: Scale,
    y: Scale,
    style: dict[str, str],
    record: SearchRecord,
) -> Markup:
    """Every trial's step time by its number, and a line for the best kept one so far."""
    dots, lines = [], []
    best: tuple[str, float] | None = None
    for trial, seconds in sorted(timed, key=lambda one: one[0].number):
        at, height = share(x.place(trial.number)), 1 - y.place(seconds)
        dots.append(_dot(trial, at, share(height), style, record, set()))
        if trial.state == "kept" and (best is None or height > best[1]):
            if best is not None:
                lines += _step(*best, at, height)
            best = (at, height)
    if best is not None:
        lines += _step(*best, "100%", best[1])
    parts = [grid(x, y), *_bound(record, y, upwards=True), *lines, *dots]
    title = "Step time of every trial, and the best so far"
    return svg(parts, height=_PROGRESS_HEIGHT, title=title, class_="trials progress")


def _step(x1: str, y1: float, x2: str, y2: float) -> list[Markup]:
    across = element("line", x1=x1, x2=x2, y1=share(y1), y2=share(y1), class_="best-line")
    down = element("line", x1=x2, x2=x2, y1=share(y1), y2=share(y2), class_="best-line")
    return [across, *([down] if y1 != y2 else [])]
