"""How results look in a notebook: small HTML that needs nothing else.

Plans are in `raypar._plan_html`, searches in `raypar.search._record_html`: lower floors know
nothing of reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypar._plan_html import card_html, table_html
from raypar._plan_text import duration

if TYPE_CHECKING:
    from raypar.train.result import Result


def result_html(result: Result) -> str:
    """The outcome of a run: its last metrics, and where its files are."""
    rows = [
        (_title(name), _value(name, value))
        for name, value in result.metrics.items()
        if isinstance(value, (int, float, str)) and not isinstance(value, bool)
    ]
    parts = result.metrics.get("breakdown")
    if isinstance(parts, dict):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in parts.items() if share >= 0.005)
        rows.append(("a step", shares))
    words = [f"files in {result.path}"]
    if result.error is not None:
        words.insert(0, f"{type(result.error).__name__}: {result.error}")
    return card_html("Result", words, table_html(("", ""), rows))


def _title(name: str) -> str:
    """``step_s`` is called step: its unit is told with its value."""
    return (name.removesuffix("_s") if _is_time(name) else name).replace("_", " ")


def _is_time(name: str) -> bool:
    return name == "seconds" or (name.endswith("_s") and not name.endswith("_per_s"))


def _value(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if _is_time(name):
        return duration(value)
    if name in ("mfu", "driver_share"):
        return f"{value:.1%}"
    return f"{value:.4g}" if abs(value) < 1e3 else f"{value:,.0f}"
