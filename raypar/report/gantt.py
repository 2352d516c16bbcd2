"""A simulated step as text: one row for every lane, time from left to right."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from raypar.errors import ConfigError
from raypar.report._played import PlayedStep
from raypar.search.simulation import Span

LETTERS = {"wait": ".", "comm": "~", "data": "d", "other": "-"}
"""What stands for a span whose kind is no letter."""
LEGEND = (
    "F forward  B backward  I, W its input and weight halves  O optimizer  G counts  "
    "~ communication  . idle"
)
_SMALLEST = 10


@dataclass(frozen=True, slots=True)
class GanttRow:
    """One lane.

    Attributes:
        label: Its name.
        cells: One letter for every column: what took most of that time.
        idle: Share of the step in which it is idle.
    """

    label: str
    cells: str
    idle: float


def gantt_rows(simulation: PlayedStep, columns: int) -> list[GanttRow]:
    """What is drawn.

    Args:
        simulation: The step.
        columns: Columns of time.

    Raises:
        ConfigError: There are fewer than 10 columns.
    """
    if columns < _SMALLEST:
        raise ConfigError(
            f"a Gantt chart needs at least {_SMALLEST} columns of time, found {columns}: widen the "
            "terminal"
        )
    return [
        GanttRow(lane.label, _cells(simulation.spans(i), simulation.step_s, columns), lane.idle)
        for i, lane in enumerate(simulation.lanes)
    ]


def gantt(simulation: PlayedStep, width: int | None = None) -> str:
    """The chart as text.

    Args:
        simulation: The step.
        width: Characters of a line; default: the terminal's.

    Raises:
        ConfigError: It is too narrow to draw in.
    """
    width = shutil.get_terminal_size((100, 24)).columns if width is None else width
    labels = [lane.label for lane in simulation.lanes]
    margin = max(map(len, labels), default=0)
    rows = gantt_rows(simulation, width - margin - len(" || 100% idle"))
    lines = [f"{row.label:<{margin}} |{row.cells}| {row.idle:4.0%} idle" for row in rows]
    end = f"{simulation.step_s * 1e3:.4g} ms"
    columns = len(rows[0].cells) if rows else 0
    axis = f"{'':<{margin}} 0{end:>{columns}}"
    return "\n".join([*lines, axis, LEGEND])


def _cells(spans: Sequence[Span], step: float, columns: int) -> str:
    """For every column the letter of what took most of its time."""
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    for span in spans:
        letter = LETTERS.get(span.kind, span.kind)
        first, last = span.start / step * columns, span.end / step * columns
        for column in range(int(first), min(int(last) + 1, columns)):
            inside = min(last, column + 1) - max(first, column)
            if inside > 0:
                shares[column][letter] = shares[column].get(letter, 0.0) + inside
    return "".join(max(s, key=lambda k: s[k]) if s else "." for s in shares)
