"""Measurements as a file, and a measurer that answers from it: searches compared offline."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypar.errors import RayparError
from raypar.plan import Plan
from raypar.search.measure import Measured, Measurer, StageSeconds
from release._plan_grid import bare, identity


@dataclass(frozen=True)
class Row:
    """One measured plan.

    Attributes:
        origin: Where the plan is from: ``uniform``, ``schedule``, ``random`` or ``search``.
        plan: The plan, as `release._plan_grid.bare` leaves it.
        measured: What it took.
        load: The machine's load average at that time.
    """

    origin: str
    plan: Plan
    measured: Measured
    load: float

    def to_json(self) -> dict[str, Any]:
        """A compact form: a list [forward, backward, optimizer] for every stage."""
        m = self.measured
        return {
            "origin": self.origin,
            "step_s": m.step_s,
            "spread": m.spread,
            "steps": m.steps,
            "took_s": m.took_s,
            "stages": [[s.forward_s, s.backward_s, s.optimizer_s] for s in m.stages],
            "peak_bytes": m.peak_bytes,
            "disturbed": m.disturbed,
            "load": self.load,
            "plan": json.loads(bare(self.plan).to_json()),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        """Reads what `to_json` gave."""
        measured = Measured(
            step_s=raw["step_s"],
            spread=raw["spread"],
            steps=raw["steps"],
            took_s=raw["took_s"],
            stages=tuple(StageSeconds(*s) for s in raw["stages"]),
            peak_bytes=raw["peak_bytes"],
            disturbed=raw["disturbed"],
        )
        return cls(raw["origin"], Plan.from_json(json.dumps(raw["plan"])), measured, raw["load"])


class Table:
    """A file of rows, one to a line, by the identity of their plans."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists():
            for raw in json.loads(path.read_text(encoding="utf-8")):
                self.put(Row.from_json(raw))

    def put(self, row: Row) -> None:
        """Adds a row, in place of an older one of the same plan."""
        self.rows[identity(row.plan)] = row

    def get(self, plan: Plan) -> Row | None:
        """The row of a plan that runs alike."""
        return self.rows.get(identity(plan))

    def write(self) -> None:
        """Writes the file: a JSON list."""
        lines = [json.dumps(row.to_json(), separators=(",", ":")) for row in self.rows.values()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        spare = self.path.with_suffix(".part")
        spare.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        spare.replace(self.path)


class ReplayMeasurer:
    """Answers from a table; a plan that is not in it is run, and kept there.

    Args:
        table: What was measured.
        inner: Runs the other plans; None: they fail as plans that do not run.

    Attributes:
        missed: Plans that were not in the table.
    """

    def __init__(self, table: Table, inner: Measurer | None = None) -> None:
        self._table = table
        self._inner = inner
        self._lock = threading.Lock()
        self.missed = 0

    def measure(self, plan: Plan, *, seconds: float) -> Measured:
        """What the table says, else what the plan takes; see `Measurer.measure`.

        Raises:
            RayparError: It is not in the table, and nobody runs it; or it does not run.
        """
        with self._lock:
            known = self._table.get(plan)
            if known is not None:
                return known.measured
            self.missed += 1
            if self._inner is None:
                raise RayparError(
                    f"the plan is not in {self._table.path.name}: give an inner measurer to run it"
                )
            found = self._inner.measure(plan, seconds=seconds)
            self._table.put(Row("search", plan, found, 0.0))
            return found

    def measure_together(self, plans: list[Plan], *, seconds: float) -> list[Measured | Exception]:
        """Each alone; see `Measurer.measure_together`."""
        found: list[Measured | Exception] = []
        for plan in plans:
            try:
                found.append(self.measure(plan, seconds=seconds))
            except RayparError as error:
                found.append(error)
        return found

    def close(self) -> None:
        """Closes the inner measurer."""
        if self._inner is not None:
            self._inner.close()
