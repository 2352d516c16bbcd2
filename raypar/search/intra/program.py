"""A problem as an integer linear program, solved by HiGHS (Huangfu and Hall 2018).

Variables: x[d, k], decision d takes option k; z[r, s, w], a reader r of a link wants state w of a
value made in state s; y[s, w], the conversion is made, for one reader or several. The z of a reader
have the x at both ends as margins (the local polytope of pairwise models, Wainwright and Jordan
2008, section 4.1), so that only the x need be integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import highspy
import numpy as np

from raypar.errors import PlanError
from raypar.search.intra.problem import Floats, Indices, Link, Problem, Reader

_SCALE = 1e4
"""The objective is brought to about this size, so that the solver's tolerances are far below it."""


@dataclass
class Answer:
    """What the solver found.

    Attributes:
        status: ``optimal``, ``time`` (the best found so far), ``infeasible`` or ``none`` (nothing
            found in time).
        choice: Decision → option.
        shares: Decision → how much of each option a relaxation takes.
        bound: No choice takes fewer seconds.
        byte_s: Seconds that one more byte of the limit would save (of a relaxation).
        variables: Number of variables.
        constraints: Number of constraints.
    """

    status: str
    choice: dict[int, int]
    shares: dict[int, Floats]
    bound: float
    byte_s: float
    variables: int
    constraints: int


@dataclass
class _Rows:
    """Constraints as triplets."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    row: list[Indices] = field(default_factory=list)
    column: list[Indices] = field(default_factory=list)
    value: list[Floats] = field(default_factory=list)

    def add(self, lower: float, upper: float, *terms: tuple[Indices, float | Floats]) -> None:
        for columns, values in terms:
            self.row.append(np.full(len(columns), len(self.lower), dtype=np.intp))
            self.column.append(columns)
            self.value.append(np.broadcast_to(np.asarray(values, dtype=float), len(columns)))
        self.lower.append(lower)
        self.upper.append(upper)


class Program:
    """The program of a problem.

    Args:
        problem: The decisions and links.
        memory_bytes: Limit of the bytes held, or None.
        tied: Whether all that a decision stands for decides alike. Else x says which *share* of
            them takes an option, and a link that not all of them have is bound to it as far as it
            must be: a relaxation of deciding each by itself.
        minimise: ``seconds`` or ``bytes``.
    """

    def __init__(
        self,
        problem: Problem,
        memory_bytes: float | None = None,
        *,
        tied: bool = True,
        minimise: str = "seconds",
    ) -> None:
        self.problem = problem
        self.tied = tied
        self.by_bytes = minimise == "bytes"
        self.rows = _Rows()
        self.seconds: list[Floats] = []
        self.nbytes: list[Floats] = []
        self.size = 0
        self.x: dict[int, Indices] = {}
        for at, decision in enumerate(problem.decisions):
            if len(decision):
                self.x[at] = self._new(decision.seconds, decision.nbytes)
                self.rows.add(1, 1, (self.x[at], 1.0))
        self.integers = self.size
        for link in problem.links:
            self._add_link(link)
        self.all_seconds = np.concatenate(self.seconds) if self.seconds else np.zeros(0)
        self.all_bytes = np.concatenate(self.nbytes) if self.nbytes else np.zeros(0)
        self.limit = None if memory_bytes is None else max(memory_bytes, 1.0)
        if self.limit is not None:
            used = np.flatnonzero(self.all_bytes)
            self.rows.add(-np.inf, 1.0, (used, self.all_bytes[used] / self.limit))

    def _new(self, seconds: Floats, nbytes: Floats | None = None) -> Indices:
        """New variables with what one of each costs."""
        first = self.size
        self.size += len(seconds)
        self.seconds.append(seconds)
        self.nbytes.append(np.zeros(len(seconds)) if nbytes is None else nbytes)
        return np.arange(first, self.size)

    def _add_link(self, link: Link) -> None:
        rows, columns = np.nonzero(np.isfinite(link.cost))
        joint = len(link.readers) > 1
        paid: dict[tuple[int, int], int] = {}
        if joint:
            asking = [set(r.wants.tolist()) for r in link.readers]
            for s, w in zip(rows.tolist(), columns.tolist(), strict=True):
                if link.cost[s, w] > 0 and sum(w in a for a in asking) > 1:
                    paid[s, w] = int(self._new(link.cost[s, w : w + 1])[0])
        for reader in link.readers:
            self._add_reader(link, reader, rows, columns, paid)
        self._add_saved(link)

    def _add_reader(
        self,
        link: Link,
        reader: Reader,
        rows: Indices,
        columns: Indices,
        paid: dict[tuple[int, int], int],
    ) -> None:
        wanted = set(reader.wants.tolist())
        made = set(link.states.tolist())
        mine = np.array(
            [s in made and w in wanted for s, w in zip(rows.tolist(), columns.tolist())], dtype=bool
        )
        rows, columns = rows[mine], columns[mine]
        cost = link.cost[rows, columns].copy()
        shared = [paid.get(p) for p in zip(rows.tolist(), columns.tolist(), strict=True)]
        cost[[i for i, y in enumerate(shared) if y is not None]] = 0.0
        z = self._new(cost)
        for i, y in enumerate(shared):
            if y is not None:
                self.rows.add(0, np.inf, (np.array([y]), 1.0), (z[i : i + 1], -1.0))
        if not self.tied:
            self.rows.add(1, 1, (z, 1.0))
        for s in sorted(made):
            self._margin(z[rows == s], link.source, np.flatnonzero(link.states == s), link.count)
        for w in sorted(wanted):
            at = np.flatnonzero(reader.wants == w)
            self._margin(z[columns == w], reader.decision, at, link.count)

    def _margin(self, z: Indices, decision: int, options: Indices, count: int) -> None:
        """What the z of one state add up to."""
        x = self.x[decision][options]
        members = self.problem.decisions[decision].count
        if self.tied or members <= count:
            self.rows.add(0, 0, (z, 1.0), (x, -1.0))
            return
        # count of the members have this link: they can be any that take these options, and no
        # fewer than are left when all others do not.
        ratio = members / count
        self.rows.add(-np.inf, 0, (z, 1.0), (x, -ratio))
        self.rows.add(1 - ratio, np.inf, (z, 1.0), (x, -ratio))

    def _add_saved(self, link: Link) -> None:
        saving = [r for r in link.readers if r.saves]
        for w in sorted({int(w) for r in saving for w in r.wants}):
            asking = [r for r in saving if w in r.wants]
            terms = [self.x[r.decision][r.wants == w] for r in asking]
            if len(terms) == 1:
                self._charge(asking[0], w, float(link.saved[w]), link)
                continue
            kept = self._new(np.zeros(1), link.saved[w : w + 1])
            for reader, x in zip(asking, terms, strict=True):
                slack = 0.0
                ratio = 1.0
                if not self.tied and self.problem.decisions[reader.decision].count > link.count:
                    ratio = self.problem.decisions[reader.decision].count / link.count
                    slack = 1 - ratio
                self.rows.add(slack, np.inf, (kept, 1.0), (x, -ratio))

    def _charge(self, reader: Reader, want: int, nbytes: float, link: Link) -> None:
        decision = self.problem.decisions[reader.decision]
        if self.tied or decision.count == link.count:
            block = list(self.x).index(reader.decision)  # the x were made first, in this order
            self.nbytes[block] = self.nbytes[block] + nbytes * (reader.wants == want)
            return
        kept = self._new(np.zeros(1), np.array([nbytes]))
        ratio = decision.count / link.count
        x = self.x[reader.decision][reader.wants == want]
        self.rows.add(1 - ratio, np.inf, (kept, 1.0), (x, -ratio))

    def solve(self, time_limit_s: float, *, relaxed: bool = False, gap: float = 0.0) -> Answer:
        """Runs the solver.

        Args:
            time_limit_s: Seconds.
            relaxed: Let x be any number from 0 to 1 (a lower bound).
            gap: Relative distance to the optimum at which to stop.
        """
        cost = self.all_bytes if self.by_bytes else self.all_seconds
        top = float(np.abs(cost).max()) if len(cost) else 0.0
        scale = _SCALE / top if top > 0 else 1.0
        highs = highspy.Highs()
        highs.silent()
        for key, value in (
            ("threads", 1),
            ("random_seed", 0),
            ("time_limit", max(time_limit_s, 0.01)),
            ("mip_rel_gap", gap),
            ("mip_abs_gap", 1e-9 * _SCALE),
            ("mip_feasibility_tolerance", 1e-9),
            ("primal_feasibility_tolerance", 1e-9),
            ("dual_feasibility_tolerance", 1e-9),
        ):
            highs.setOptionValue(key, value)
        highs.passModel(self._model(cost * scale, relaxed))
        highs.run()
        return self._answer(highs, scale, relaxed)

    def _model(self, cost: Floats, relaxed: bool) -> highspy.HighsLp:
        rows = self.rows
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.size, len(rows.lower)
        lp.col_cost_ = cost
        lp.col_lower_ = np.zeros(self.size)
        upper = np.full(self.size, np.inf)
        upper[: self.integers] = 1.0
        lp.col_upper_ = upper
        lp.row_lower_ = np.array(rows.lower)
        lp.row_upper_ = np.array(rows.upper)
        row = np.concatenate(rows.row)
        order = np.argsort(row, kind="stable")
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.searchsorted(row[order], np.arange(lp.num_row_ + 1))
        lp.a_matrix_.index_ = np.concatenate(rows.column)[order]
        lp.a_matrix_.value_ = np.concatenate(rows.value)[order]
        if not relaxed:
            kinds = [highspy.HighsVarType.kInteger] * self.integers
            kinds += [highspy.HighsVarType.kContinuous] * (self.size - self.integers)
            lp.integrality_ = kinds
        return lp

    def _answer(self, highs: highspy.Highs, scale: float, relaxed: bool) -> Answer:
        statuses = highspy.HighsModelStatus
        status = highs.getModelStatus()
        info = highs.getInfo()
        rows = len(self.rows.lower)
        if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
            return Answer("infeasible", {}, {}, np.inf, 0.0, self.size, rows)
        if status not in (statuses.kOptimal, statuses.kTimeLimit):
            raise PlanError(f"the solver stopped with {highs.modelStatusToString(status)!r}")
        done = status == statuses.kOptimal
        if info.primal_solution_status != int(highspy.SolutionStatus.kSolutionStatusFeasible):
            return Answer("none", {}, {}, -np.inf, 0.0, self.size, rows)
        values = np.array(highs.getSolution().col_value)
        shares = {d: values[x] for d, x in self.x.items()}
        byte_s = 0.0
        if not relaxed:
            bound = info.mip_dual_bound / scale
        else:
            bound = info.objective_function_value / scale if done else -np.inf
            if self.limit is not None:  # the limit is the last row
                byte_s = abs(highs.getSolution().row_dual[-1]) / scale / self.limit
        choice = {d: int(v.argmax()) for d, v in shares.items()}
        status_text = "optimal" if done else "time"
        return Answer(status_text, choice, shares, bound, byte_s, self.size, rows)
