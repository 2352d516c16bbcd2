"""What changes over a run: its loss, the parts of its steps, its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from raypar._plan_text import duration
from raypar.report.page._svg import Scale, element, grid, labels, share, stretched, svg
from raypar.train.breakdown import PARTS

_BINS = 400
_PART_BINS = 120
_HEIGHT, _SMALL = 240, 130
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curve:
    """A drawing with its axes.

    Attributes:
        title: What it shows.
        words: What is to be said of it.
        drawing: The drawing.
        x_axis: Texts of the axis of steps.
        y_axis: Texts of the axis of values.
    """

    title: str
    words: str
    drawing: Markup
    x_axis: Markup
    y_axis: Markup


def loss_curve(
    steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> Curve | None:
    """Loss over steps, with a dot for every evaluation; None with less than two points."""
    points = series(steps, "loss")
    dots = [(float(line["step"]), value) for line in evaluations
            if (value := number(line.get("eval_loss"))) is not None]  # fmt: skip
    words = "of the global batch of every step"
    if dots:
        words += "; dots: loss on the evaluation data"
    return _curve("loss", words, points, dots, _number, _HEIGHT)


def small_curves(steps: Sequence[dict[str, Any]]) -> list[Curve]:
    """Gradient norm, learning rate and throughput, as far as they are known and change."""
    found: list[Curve] = []
    for key, title, words in (
        ("grad_norm", "gradient norm", "before clipping"),
        ("lr", "learning rate", "of the first parameter group"),
        ("tokens_per_s", "tokens per second", "of the whole run"),
        ("samples_per_s", "samples per second", "of the whole run"),
        ("mfu", "MFU", "share of what the devices could compute"),
    ):
        if key == "samples_per_s" and any(curve.title == "tokens per second" for curve in found):
            continue
        points = series(steps, key)
        if len({value for _, value in points}) > 1:
            made = _curve(title, words, points, [], _number, _SMALL)
            if made is not None:
                found.append(made)
    return found


def parts_curve(steps: Sequence[dict[str, Any]]) -> Curve | None:
    """The parts of the steps, one on the other, over the run; None with less than two steps."""
    # The first step builds and warms up: beside it one would see nothing of the others.
    known = [line for line in steps[1:] if line.get("breakdown")]
    if len(known) < 2:
        return None
    rows = np.array(
        [[number(line["breakdown"].get(part)) or 0.0 for part in PARTS] for line in known]
    )
    at = np.array([line["step"] + 1 for line in known], dtype=float)
    bins = np.array_split(np.arange(len(known)), min(len(known), _PART_BINS))
    heights = np.array([np.median(rows[own], axis=0) for own in bins])
    edges = np.array([at[own[0]] for own in bins] + [at[-1] + 1])
    x = Scale(float(edges[0]), float(edges[-1]))
    y = Scale.around([float(heights.sum(axis=1).max())], zero=True)
    below = np.zeros(len(bins))
    areas = []
    for number_, part in enumerate(PARTS):
        above = below + heights[:, number_]
        if heights[:, number_].any():
            areas.append(_steps_area(f"k-{STYLE[part]}", edges, below, above, x, y, part))
        below = above
    drawing = svg(
        [stretched(areas), grid(x, None, most=8), grid(None, y, most=4)], height=_SMALL + 50,
        title="Parts of the step over the run", class_="memory parts",
    )  # fmt: skip
    more = f"; each column is the median of {len(bins[0])} steps" if len(bins[0]) > 1 else ""
    return Curve(
        "step time",
        f"mean of all ranks, without the first step{more}",
        drawing,
        labels(x, _whole, most=8),
        labels(y, duration, upwards=True, most=4),
    )


STYLE = {
    "compute": "F",
    "communication": "comm",
    "bubble": "wait",
    "data": "data",
    "optimizer": "O",
    "other": "other",
}
"""Part of a step → its style class, after ``k-``."""


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def series(steps: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(steps done, value) of all lines that have a finite one."""
    return [
        (line["step"] + 1.0, value)
        for line in steps
        if (value := number(line.get(key))) is not None
    ]


def _number(value: float) -> str:
    """``0.0314``, ``4.25``, ``15,000``."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _curve(
    title: str,
    words: str,
    points: Sequence[Point],
    dots: Sequence[Point],
    text: Callable[[float], str],
    height: int,
) -> Curve | None:
    if len(points) + len(dots) < 2 or len({step for step, _ in [*points, *dots]}) < 2:
        return None
    steps = [step for step, _ in [*points, *dots]]
    values = [value for _, value in [*points, *dots]]
    x = Scale(min(steps), max(steps))
    y = Scale.around(values)
    parts = [
        grid(x, None, most=8),
        grid(None, y, most=5),
        stretched([_line(_thinned(points), x, y)]),
    ]
    for step, value in dots:
        parts.append(
            element(
                "circle", cx=share(x.place(step)), cy=share(1 - y.place(value)), r=4,
                class_="evaluation", data_t=f"evaluation after step {step:.0f}: {text(value)}",
            )
        )  # fmt: skip
    for step, value in _marked(points):
        parts.append(
            element(
                "circle", cx=share(x.place(step)), cy=share(1 - y.place(value)), r=7,
                class_="hit", data_t=f"step {step:.0f}: {title} {text(value)}",
            )
        )  # fmt: skip
    drawing = svg(parts, height=height, title=f"{title} over steps", class_="curve")
    return Curve(
        title, words, drawing, labels(x, _whole, most=8), labels(y, text, upwards=True, most=5)
    )


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else ""


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most some hundred points; a bin keeps its lowest and its highest."""
    if len(points) <= 2 * _BINS:
        return list(points)
    found: list[Point] = []
    for own in np.array_split(np.arange(len(points)), _BINS):
        members = [points[i] for i in own]
        ends = {min(members, key=lambda p: p[1]), max(members, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def _marked(points: Sequence[Point], most: int = 150) -> list[Point]:
    """Points that tell their value on hover."""
    stride = max(1, -(-len(points) // most))
    return [*points[::stride]]


def _line(points: Sequence[Point], x: Scale, y: Scale) -> Markup:
    places = [f"{1000 * x.place(a):.1f} {1000 * (1 - y.place(b)):.1f}" for a, b in points]
    return element(
        "polyline", points=",".join(places), class_="line", vector_effect="non-scaling-stroke"
    )


def _steps_area(
    style: str,
    edges: np.ndarray,
    below: np.ndarray,
    above: np.ndarray,
    x: Scale,
    y: Scale,
    name: str,
) -> Markup:
    words = []
    for i in range(len(below)):
        a, b = (round(1000 * x.place(edge), 1) for edge in edges[i : i + 2])
        top, base = (round(1000 * (1 - y.place(v)), 1) for v in (above[i], below[i]))
        words.append(f"M{a:g} {base:g}V{top:g}H{b:g}V{base:g}Z")
    mean = duration(float((above - below).mean()))
    return element("path", d="".join(words), class_=style, data_t=f"{name}: {mean} on average")
