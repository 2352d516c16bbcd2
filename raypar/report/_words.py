"""Numbers, names and long lines as reports write them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from raypar._plan_text import WIDTH

__all__ = ["WIDTH", "bar", "counted", "paragraph", "percent"]


def bar(share: float, cells: int = 20) -> str:
    """``[########............]``; what is above 1 ends in ``!``."""
    filled = min(cells, round(share * cells))
    if share > 1.0:
        return f"[{'#' * (cells - 1)}!]"
    return f"[{'#' * filled}{'.' * (cells - filled)}]"


def percent(share: float) -> str:
    """``12 %``; what would round to nothing is ``< 1 %``."""
    return "< 1 %" if share < 0.005 else f"{100 * share:.0f} %"


def counted(counts: dict[str, int], shown: int = 4) -> str:
    """``12 linear, 6 gelu and 3 others``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{count} {name}" for name, count in ordered[:shown]]
    rest = sum(count for _, count in ordered[shown:])
    return ", ".join(parts) + (f" and {rest} others" if rest else "")


def paragraph(first: str, parts: Sequence[str], separator: str = "; ") -> list[str]:
    """Parts on lines of at most `WIDTH` columns, the later ones indented below the first.

    A line ends behind a part where that is possible.

    Args:
        first: How the first line begins; its leading spaces are the indent.
        parts: What follows.
        separator: Between the parts.
    """
    indent = " " * (len(first) - len(first.lstrip(" ")))
    more = indent + "    "
    lines, now = [], first.rstrip(" ") if not parts else first
    for i, part in enumerate(parts):
        piece = part + (separator.rstrip(" ") if i + 1 < len(parts) else "")
        fresh = not now.strip(" ") or now.strip(" ") == first.strip(" ")
        if len(now) + len(piece) > WIDTH and not fresh:
            lines.append(now.rstrip(" "))
            now = more
        now += piece + " "
    lines.append(now.rstrip(" "))
    return [
        row
        for line in lines
        for row in textwrap.wrap(
            line.lstrip(" "),
            WIDTH,
            initial_indent=line[: len(line) - len(line.lstrip(" "))],
            subsequent_indent=more,
            break_on_hyphens=False,
        )
    ]
