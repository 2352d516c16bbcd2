"""What a check of the doctor found, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ``ok``, ``warn`` (works, but not as well as it could) or ``fail``.
        found: What is there.
        mend: The command or change that puts it right; empty where nothing is wrong.
    """

    name: str
    status: str
    found: str
    mend: str = ""


def failed(findings: Iterable[Finding]) -> int:
    """How many things have to be mended."""
    return sum(row.status == FAIL for row in findings)


def render(findings: Iterable[Finding], fine: str = "raypar can run here") -> None:
    """Prints a table (plain lines where rich is missing), and then what to do.

    Args:
        findings: What to show.
        fine: The last line where nothing has to be mended.
    """
    rows = list(findings)
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for row in rows:
            print(
                f"[{row.status}] {row.name}: {row.found}" + (f" -> {row.mend}" if row.mend else "")
            )
        return
    colours = {OK: "green", WARN: "yellow", FAIL: "bold red"}
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            Text(row.status, colours.get(row.status, "")), Text(row.name), Text(row.found)
        )
    console.print(table)
    for row in rows:
        if row.mend:
            colour = colours.get(row.status, "")
            # soft_wrap: a command must be copied as one line.
            console.print(Text.assemble((f"{row.name}: ", colour), row.mend), soft_wrap=True)
    bad = failed(rows)
    console.print(f"{bad} to mend before raypar works" if bad else fine)
