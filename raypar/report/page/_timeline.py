"""The predicted Gantt chart: every lane's spans, folded where a step has too many to be seen."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from raypar._plan_text import duration
from raypar.plan import Plan
from raypar.report._played import PlayedStep
from raypar.report.gantt import LETTERS, gantt_rows
from raypar.report.page._svg import Scale, element, grid, joined, labels, share, svg
from raypar.report.page._words import KINDS, moment
from raypar.schedules.instructions import COMPUTE, Instruction
from raypar.search.simulation import Span

_MOST_SPANS = 2600
"""Spans that are drawn one by one; a step of more is shown as a whole in columns, and its
beginning, middle and end one by one."""
_MOST_LANES = 32
_COLUMNS = 240
_SHADES = 3
"""Chunks beyond the first that have a shade of their own."""
_LABELLED = 0.022, 0.06
"""Share of the width from which on a span carries its microbatch's number: of one drawing, and of
three side by side."""
_NO_INSTRUCTION = frozenset({"OPTIMIZER", "DATA", "END"})
"""Names of spans that are no part of an instruction list."""
_KIND = {letter: kind for kind, letter in LETTERS.items()}


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing.

    Attributes:
        title: What part of the step it shows; empty for all of it.
        drawing: The drawing.
        axis: The texts of its time axis.
    """

    title: str
    drawing: Markup
    axis: Markup


@dataclass(frozen=True, slots=True)
class Gantt:
    """The chart.

    Attributes:
        rows: (name, hover text) of every lane that is shown.
        row_height: Pixels.
        whole: The whole step in columns, or None where `panels` show all of it.
        panels: Drawings span by span.
        kinds: Kinds of span that occur.
        folded: What is left out, in words; empty where nothing is.
    """

    rows: list[tuple[str, str]]
    row_height: int
    whole: Panel | None
    panels: list[Panel]
    kinds: list[str]
    folded: str


def gantt_chart(plan: Plan, played: PlayedStep, until: float | None = None) -> Gantt:
    """Draws a step.

    Args:
        plan: Its plan.
        played: The step.
        until: Seconds at which the time axis ends, so that several charts have one scale; default:
            with the step.
    """
    until = until or played.step_s
    chosen = shown_lanes(played)
    spans = [played.spans(i) for i in chosen]
    height = 24 if len(chosen) <= 12 else 18 if len(chosen) <= 24 else 14
    chunks = [chunk for _, chunk in plan.schedule.placement]
    kinds = {s.kind for lane in spans for s in lane}
    many = sum(map(len, spans)) > _MOST_SPANS
    windows = _windows(spans, played.step_s) if many else [("", 0.0, until)]
    panels = [
        Panel(
            title,
            _Canvas(Scale(start, end), height, chunks, _LABELLED[many], played.step_s).drawing(
                spans, title
            ),
            labels(Scale(start, end), moment, most=3 if many else 8),
        )
        for title, start, end in windows
    ]
    folded = []
    if len(chosen) < len(played.lanes):
        folded.append(
            f"{len(chosen)} of {len(played.lanes)} lanes are shown, evenly spread, with the "
            "busiest and the fullest"
        )
    if many:
        folded.append(
            "the first picture shows for every moment what takes most of it; below it the "
            "beginning, a part of the steady state and the end in full"
        )
    return Gantt(
        rows=[_row(played, i) for i in chosen],
        row_height=height,
        whole=_whole(played, chosen, height) if many else None,
        panels=panels,
        kinds=[k for k in KINDS if k in kinds],
        folded="; ".join(folded),
    )


def shown_lanes(played: PlayedStep, most: int = _MOST_LANES) -> list[int]:
    """Lanes to draw: all, or so many evenly spread, with the busiest and the fullest of all."""
    count = len(played.lanes)
    if count <= most:
        return list(range(count))
    busiest = min(range(count), key=lambda i: played.lanes[i].idle)
    fullest = max(
        range(count), key=lambda i: played.peak_bytes[i] / (played.lanes[i].memory_limit or 1)
    )
    spread = most - 2
    even = {round(i * (count - 1) / (spread - 1)) for i in range(spread)}
    return sorted(even | {busiest, fullest})


def _row(played: PlayedStep, lane: int) -> tuple[str, str]:
    found = played.lanes[lane]
    name = f"group {found.group}" + ("" if found.replica is None else f" r{found.replica}")
    devices, stages = (", ".join(map(str, n)) for n in (found.devices[:8], found.stages))
    more = " …" if len(found.devices) > 8 else ""
    return name, (
        f"{found.label}: stages {stages} on devices {devices}{more}; computes {found.compute:.0%} "
        f"of the step, communicates {found.communication:.0%}, is idle {found.idle:.0%}"
    )


def _windows(spans: Sequence[Sequence[Span]], step: float) -> list[tuple[str, float, float]]:
    """(title, from, to) of the beginning, the middle and the end: equally long, as long as fits."""
    starts = [[s.start for s in lane] for lane in spans]
    ends = [[s.end for s in lane] for lane in spans]

    def count(start: float, end: float) -> int:
        return sum(
            max(0, bisect_left(a, end) - bisect_right(b, start))
            for a, b in zip(starts, ends, strict=True)
        )

    def windows(width: float) -> list[tuple[str, float, float]]:
        middle = (step - width) / 2
        return [
            ("beginning", 0.0, width),
            ("steady state", middle, middle + width),
            ("end", step - width, step),
        ]

    width = step / 3
    while sum(count(a, b) for _, a, b in windows(width)) > _MOST_SPANS:
        width *= 0.8
    return windows(width)


@dataclass(frozen=True, slots=True)
class _Canvas:
    """How lanes are drawn.

    Attributes:
        x: The time axis.
        height: Of a row, in pixels.
        chunks: Of every stage, its chunk.
        labelled: Share of the width from which on a span carries its microbatch's number.
        end: Seconds at which the step ends.
    """

    x: Scale
    height: int
    chunks: Sequence[int]
    labelled: float
    end: float

    def drawing(self, spans: Sequence[Sequence[Span]], title: str) -> Markup:
        """All lanes' spans that lie on the time axis."""
        parts = [grid(self.x, None)]
        for row, lane in enumerate(spans):
            parts.append(_background(row, self.height, self.x.place(self.end)))
            for span in lane:
                if span.end > self.x.low and span.start < self.x.high and span.kind != "wait":
                    parts += self._span(span, row)
        name = f"Gantt chart of {title or 'a step'}: a row for each rank group, time to the right"
        return svg(parts, height=len(spans) * self.height, title=name, class_="gantt")

    def _span(self, span: Span, row: int) -> list[Markup]:
        start, end = self.x.place(span.start), self.x.place(span.end)
        once = span.name in _NO_INSTRUCTION
        now = None if once else Instruction.parse(span.name)
        stage = now.stage if now is not None and now.kind in COMPUTE else None
        chunk = 0 if stage is None else min(self.chunks[stage], _SHADES)
        box = element(
            "rect",
            x=share(start),
            y=row * self.height + 1,
            width=share(max(end - start, 2e-4)),
            height=self.height - 2,
            class_=f"k-{span.kind} c{chunk}" if chunk else f"k-{span.kind}",
            data_g=f"{span.name}|{moment(span.start)}|{duration(span.end - span.start)}",
        )
        if stage is None or now is None or end - start < self.labelled:
            return [box]
        middle, base = share((start + end) / 2), row * self.height + self.height // 2 + 4
        return [box, element("text", [str(now.microbatch)], x=middle, y=base)]


def _background(row: int, height: int, end: float = 1.0) -> Markup:
    """Idle time is what nothing else covers."""
    return element(
        "rect", x="0", y=row * height + 1, width=share(end), height=height - 2, class_="k-wait",
        data_t="idle: waits for somebody who has not sent yet",
    )  # fmt: skip


def _whole(played: PlayedStep, chosen: Sequence[int], height: int) -> Panel:
    """The step in columns, equal neighbours as one."""
    rows = gantt_rows(played, _COLUMNS)
    parts = []
    for row, lane in enumerate(chosen):
        parts.append(_background(row, height))
        cells, start = rows[lane].cells, 0
        for at in range(1, len(cells) + 1):
            if at == len(cells) or cells[at] != cells[start]:
                kind = _KIND.get(cells[start], cells[start])
                if kind != "wait":
                    parts.append(
                        element(
                            "rect",
                            x=share(start / _COLUMNS),
                            y=row * height + 1,
                            width=share((at - start) / _COLUMNS),
                            height=height - 2,
                            class_=f"k-{kind}",
                        )
                    )
                start = at
    drawing = svg(
        [joined(parts)],
        height=len(chosen) * height,
        title="The whole step: for every moment what takes most of it",
        class_="gantt",
    )
    scale = Scale(0.0, played.step_s)
    return Panel("the whole step", drawing, labels(scale, moment, most=8))
