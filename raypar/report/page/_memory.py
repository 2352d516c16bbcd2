"""What ranks hold over time, as stacked areas against what their devices have."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from raypar._plan_text import duration, size
from raypar.report._played import PlayedStep
from raypar.report.page._svg import (
    Scale,
    element,
    grid,
    labels,
    share,
    stretched,
    svg,
)
from raypar.report.page._words import MEMORY, moment
from raypar.search.simulation import MOVING, LaneReport, MemoryTimeline

_MOST = 12
_BINS = 120
_HEIGHT = 120
_RESIDENT = ("parameters", "optimizer", "buffers", "overhead")


@dataclass(frozen=True, slots=True)
class MemoryChart:
    """One rank group's memory over a step.

    Attributes:
        title: Which ranks.
        words: Peak, limit and when.
        full: Peak as a share of the limit.
        drawing: The areas.
        x_axis: Texts of the time axis.
        y_axis: Texts of the axis of bytes.
    """

    title: str
    words: str
    full: float
    drawing: Markup
    x_axis: Markup
    y_axis: Markup


def memory_charts(
    played: PlayedStep, until: float | None = None, top: int = 0
) -> tuple[list[MemoryChart], str]:
    """A chart for every rank group, and what is left out in words.

    Ranks that read alike share a chart; of more than a dozen the fullest are shown.

    Args:
        played: The step.
        until: Seconds at which the time axes end; default: with the step.
        top: Bytes that have a place on all axes, so that several steps' charts have one scale.
    """
    pairs = list(zip(played.lanes, played.memory, strict=True))
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (lane, memory) in enumerate(pairs):
        parts = tuple(sorted(memory.peak_parts.items()))
        groups.setdefault((lane.memory_limit, memory.peak_bytes, parts), []).append(i)
    alike = list(groups.values())
    fullest = sorted(alike, key=lambda own: -_full(*pairs[own[0]]))[:_MOST]
    charts = [_chart(played, own, until or played.step_s, top) for own in alike if own in fullest]
    left = len(alike) - len(fullest)
    return charts, f"{left} more rank groups fill less of their memory" if left else ""


def _full(lane: LaneReport, memory: MemoryTimeline) -> float:
    """Peak as a share of the limit; 0 where that is not known."""
    return memory.peak_bytes / lane.memory_limit if lane.memory_limit else 0.0


def _chart(played: PlayedStep, own: list[int], until: float, top: int) -> MemoryChart:
    lane, memory = played.lanes[own[0]], played.memory[own[0]]
    more = f" and {len(own) - 1} more alike" if len(own) > 1 else ""
    full = _full(lane, memory)
    x = Scale(0.0, until)
    near = full > 0.25  # of a device that is nearly empty the limit would leave nothing to see
    y = Scale.around(
        [float(memory.peak_bytes), float(lane.memory_limit) if near else 0.0, float(top)],
        zero=True,
    )
    areas = stretched(_areas(memory, x, y, played.step_s))
    marks = [_limit(lane.memory_limit, y)] if near else []
    marks.append(_peak(memory, x, y))
    drawing = svg(
        [grid(x, None, most=3), grid(None, y, most=4), areas, *marks],
        height=_HEIGHT,
        title=f"Memory of {lane.label} over a step: peak {size(memory.peak_bytes)}",
        class_="memory",
    )
    limit = f" of {size(lane.memory_limit)} ({full:.0%})" if lane.memory_limit else ""
    words = f"peak {size(memory.peak_bytes)}{limit} at {duration(memory.peak_s)}"
    return MemoryChart(
        f"{lane.label}{more}",
        words if near or not limit else f"{words}; the limit is far above this picture",
        full,
        drawing,
        labels(x, moment, most=3),
        labels(y, size, upwards=True, most=4),
    )


def _areas(memory: MemoryTimeline, x: Scale, y: Scale, step: float) -> list[Markup]:
    """What is held all the time as bars, what comes and goes as areas on top of them."""
    times, rows = _binned(memory, step)
    found, below = [], np.zeros(len(times))
    for key in MEMORY:
        if key in _RESIDENT:
            row = np.full(len(times), float(memory.resident.get(key, 0)))
        else:
            row = rows[MOVING.index(key)]
        if row.any():
            above = below + row
            found.append(_area(f"m-{key}", times, below, above, x, y, _tip(key, row)))
            below = above
    return found


def _tip(key: str, row: np.ndarray) -> str:
    name, meaning = MEMORY[key]
    least, most = size(float(row.min())), size(float(row.max()))
    return f"{name}: {most if least == most else f'{least} to {most}'} ({meaning})"


def _binned(memory: MemoryTimeline, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Times, and a row for each part that moves; a bin shows the moment when most is held."""
    times, moving = memory.times, memory.moving.astype(float)
    order = np.argsort(times, kind="stable")
    times, moving = times[order], moving[:, order]
    last = np.append(times[1:] > times[:-1], True)  # changes at one time are one change
    spikes = _lasting(times, moving, last)
    times, moving = times[spikes], moving[:, spikes]
    if len(times) <= 2 * _BINS:
        return np.append(times, step), np.hstack([moving, moving[:, -1:]])
    edges = np.linspace(0.0, step, _BINS + 1)
    held = moving.sum(axis=0)
    chosen = []
    for a, b in pairwise(edges):
        first = max(0, int(np.searchsorted(times, a, "right")) - 1)
        end = max(first + 1, int(np.searchsorted(times, b, "left")))
        chosen.append(first + int(held[first:end].argmax()))
    columns = moving[:, chosen]
    return edges, np.hstack([columns, columns[:, -1:]])


def _lasting(times: np.ndarray, moving: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Indices of the last change at each time, and of the fullest moment of all.

    What is held for no time at all, between two changes of one time, is no memory; only the peak
    is told of as the simulation tells it.
    """
    top = int(moving.sum(axis=0).argmax())
    return np.flatnonzero(last | (np.arange(len(times)) == top))


def _area(
    style: str,
    times: np.ndarray,
    below: np.ndarray,
    above: np.ndarray,
    x: Scale,
    y: Scale,
    tip: str,
) -> Markup:
    """A staircase between two rows, in a square of 1000 × 1000."""

    def across(time: float) -> int:
        return round(1000 * x.place(time))

    def up(nbytes: float) -> int:
        return round(1000 * (1 - y.place(nbytes)))

    words = [f"M0 {up(above[0])}"]
    for i in range(1, len(times) - 1):
        if above[i] != above[i - 1]:
            words.append(f"H{across(times[i])}V{up(above[i])}")
    words.append(f"H{across(times[-1])}V{up(below[-1])}")
    for i in range(len(times) - 2, 0, -1):
        if below[i] != below[i - 1]:
            words.append(f"H{across(times[i])}V{up(below[i - 1])}")
    return element("path", d=f"{''.join(words)}H0Z", class_=style, data_t=tip)


def _limit(limit: int, y: Scale) -> Markup:
    at = share(1 - y.place(float(limit)))
    text = f"the device holds {size(limit)}"
    return element("line", x1="0", x2="100%", y1=at, y2=at, class_="limit", data_t=text)


def _peak(memory: MemoryTimeline, x: Scale, y: Scale) -> Markup:
    return element(
        "circle",
        cx=share(x.place(memory.peak_s)),
        cy=share(1 - y.place(float(memory.peak_bytes))),
        r=3,
        class_="peak",
        data_t=f"peak: {size(memory.peak_bytes)} at {duration(memory.peak_s)}",
    )
