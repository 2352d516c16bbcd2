"""Line charts as SVG text, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 34, 46
_COLOURS = ("#1f5fa8", "#c8501e", "#3a8f3a", "#7a4fa3")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: Above it.
        x: What goes to the right.
        y: What goes up.
        lines: Name → points (x, y), all positive.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def side_by_side(charts: Sequence[Chart]) -> str:
    """The charts in one picture, as an SVG document."""
    parts = [
        f'<g transform="translate({i * _WIDTH},0)">{_draw(chart)}</g>'
        for i, chart in enumerate(charts)
    ]
    width = _WIDTH * len(charts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{_HEIGHT}" '
        f'fill="white"/>{"".join(parts)}</svg>\n'
    )


def _draw(chart: Chart) -> str:
    points = [p for line in chart.lines.values() for p in line]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    low = 10 ** math.floor(math.log10(min(ys)))
    high = 10 ** math.ceil(math.log10(max(ys)))
    high = high if high > low else 10 * low
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def across(x: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return _LEFT + (right - _LEFT) * math.log(x / xs[0]) / span

    def up(y: float) -> float:
        return bottom - (bottom - _TOP) * math.log(y / low) / math.log(high / low)

    parts = [_text((_LEFT + right) / 2, 18, chart.title, "middle", "bold")]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        height = up(10.0**power)
        parts.append(_rule(_LEFT, height, right, height, "#dddddd"))
        parts.append(_text(_LEFT - 6, height + 4, f"{10.0**power:g}", "end"))
    for x in xs:
        parts.append(_rule(across(x), bottom, across(x), bottom + 4, "#444444"))
        parts.append(_text(across(x), bottom + 16, f"{x:g}", "middle"))
    parts.append(_rule(_LEFT, bottom, right, bottom, "#444444"))
    parts.append(_rule(_LEFT, _TOP, _LEFT, bottom, "#444444"))
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 10, chart.x, "middle"))
    parts.append(_text(_LEFT, _TOP - 6, chart.y, "middle"))
    for number, (name, line) in enumerate(chart.lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        ordered = sorted(line)
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in ordered)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>'
            for x, y in ordered
        ]
        height = _TOP + 14 + 15 * number
        parts.append(_rule(_LEFT + 12, height - 4, _LEFT + 32, height - 4, colour, 2))
        parts.append(_text(_LEFT + 38, height, name, "start"))
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def _rule(x: float, y: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )
