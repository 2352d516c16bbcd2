"""The largest load of any placement as an integer program, with a bound.

Binaries x[i, d] place items; z[t, d] says that accelerator d pays for tensor t: it is at least the
difference of x between any two items of t on d. The objective is above every device's load. This is
the non-contiguous program of Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of
DNN Graph Operators" (NeurIPS), section 5.2, with one variable per tensor and border instead of two.
Accelerators are alike, so that the j-th item of a fixed order only goes to the first j + 1 of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np

from raypar.search.exact.placement_problem import PlacementProblem

_SCALE = 1e3  # the objective is brought to about this size, far above the solver's tolerances
_TOLERANCE = 1e-7
_TRUST = 1e-6  # relative: what of the solver's bound is left to its tolerances


@dataclass(frozen=True)
class Solved:
    """What the solver knows.

    Attributes:
        device_of: Device of every item in its best placement; None where it found none.
        bound: No placement has a smaller largest load; infinite if there is no placement.
    """

    device_of: list[int] | None
    bound: float


class PlacementProgram:
    """The integer program of a problem.

    Args:
        problem: The problem.
        start: A placement that fits: the solver looks for better ones.
    """

    def __init__(self, problem: PlacementProblem, start: Sequence[int] | None = None) -> None:
        self.problem = problem
        n, d = problem.n_items, problem.n_devices
        weight = np.where(problem.only_cpu, 0.0, problem.accelerator_s)
        degree = np.zeros(n)
        for items, cost in zip(problem.tensors, problem.cost, strict=True):
            degree[list(items)] += cost
        self.ranked = np.argsort(-(weight + degree), kind="stable").tolist()
        self.start = None if start is None else self._relabelled(start)
        self.first_z = n * d
        self.objective = self.first_z + len(problem.tensors) * problem.accelerators
        largest = max(float(problem.accelerator_s.sum()), float(problem.cpu_s.max(initial=0.0)))
        self.scale = _SCALE / (problem.objective(start) if start else largest or 1.0)
        self.rows: list[tuple[float, float, list[int], list[float]]] = []
        self._constraints()

    def _relabelled(self, device_of: Sequence[int]) -> list[int]:
        """The placement with accelerators numbered as the ranked items meet them."""
        k = self.problem.accelerators
        number: dict[int, int] = {}
        for item in self.ranked:
            if device_of[item] < k:
                number.setdefault(device_of[item], len(number))
        return [number[d] if d < k else d for d in device_of]

    def _x(self, item: int, device: int) -> int:
        return item * self.problem.n_devices + device

    def _z(self, tensor: int, device: int) -> int:
        return self.first_z + tensor * self.problem.accelerators + device

    def _constraints(self) -> None:
        problem, scale = self.problem, self.scale
        n, k = problem.n_items, problem.accelerators
        rows = self.rows
        for item in range(n):
            columns = [self._x(item, d) for d in range(problem.n_devices)]
            rows.append((1.0, 1.0, columns, [1.0] * len(columns)))
        for t, items in enumerate(problem.tensors):
            for d in range(k):
                for other in items[1:]:
                    columns = [self._z(t, d), self._x(items[0], d), self._x(other, d)]
                    rows.append((0.0, np.inf, columns, [1.0, -1.0, 1.0]))
                    rows.append((0.0, np.inf, columns, [1.0, 1.0, -1.0]))
        for d in range(problem.n_devices):
            times = problem.accelerator_s if d < k else problem.cpu_s
            columns = [self._x(i, d) for i in range(n)]
            values = (times * scale).tolist()
            if d < k:
                columns += [self._z(t, d) for t in range(len(problem.tensors))]
                values += (problem.cost * scale).tolist()
            rows.append((-np.inf, 0.0, [*columns, self.objective], [*values, -1.0]))
            if d < k and problem.size.sum() > problem.memory:
                sizes = (problem.size / (problem.memory or 1.0)).tolist()
                rows.append((-np.inf, min(problem.memory, 1.0), columns[:n], sizes))

    def solve(self, seconds: float, threads: int = 1) -> Solved:
        """Solves the program, or as much of it as fits some time.

        Args:
            seconds: The most to take, wall clock.
            threads: Of the solver.
        """
        highs = highspy.Highs()
        highs.silent()
        for key, value in (
            ("threads", threads),
            ("random_seed", 0),
            ("time_limit", max(seconds, 0.01)),
            ("mip_rel_gap", _TOLERANCE),
            ("mip_feasibility_tolerance", _TOLERANCE),
            ("primal_feasibility_tolerance", _TOLERANCE),
            ("dual_feasibility_tolerance", _TOLERANCE),
        ):
            highs.setOptionValue(key, value)
        highs.passModel(self._model())
        if self.start is not None:
            given = highspy.HighsSolution()
            given.col_value = self._values(self.start)
            highs.setSolution(given)
        highs.run()
        return self._answer(highs)

    def _values(self, device_of: Sequence[int]) -> list[float]:
        """The variables of a placement."""
        values = np.zeros(self.objective + 1)
        for item, device in enumerate(device_of):
            values[self._x(item, device)] = 1.0
        for t, items in enumerate(self.problem.tensors):
            touched = {device_of[i] for i in items}
            for device in touched if len(touched) > 1 else ():
                if device < self.problem.accelerators:
                    values[self._z(t, device)] = 1.0
        values[self.objective] = self.problem.objective(device_of) * self.scale
        found: list[float] = values.tolist()
        return found

    def _model(self) -> highspy.HighsLp:
        problem = self.problem
        n, k, d = problem.n_items, problem.accelerators, problem.n_devices
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self.objective + 1, len(self.rows)
        cost = np.zeros(lp.num_col_)
        cost[self.objective] = 1.0
        upper = np.ones(lp.num_col_)
        upper[self.objective] = np.inf
        for item in np.flatnonzero(problem.only_cpu):
            upper[[self._x(int(item), device) for device in range(k)]] = 0.0
        for place, item in enumerate(self.ranked[:k]):
            upper[[self._x(item, device) for device in range(place + 1, k)]] = 0.0
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(lp.num_col_), upper
        lp.row_lower_ = np.array([row[0] for row in self.rows])
        lp.row_upper_ = np.array([row[1] for row in self.rows])
        lengths = [len(row[2]) for row in self.rows]
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(lengths)])
        lp.a_matrix_.index_ = np.concatenate([row[2] for row in self.rows])
        lp.a_matrix_.value_ = np.concatenate([row[3] for row in self.rows])
        kinds = [highspy.HighsVarType.kInteger] * (n * d)
        lp.integrality_ = kinds + [highspy.HighsVarType.kContinuous] * (lp.num_col_ - n * d)
        return lp

    def _answer(self, highs: highspy.Highs) -> Solved:
        status, statuses = highs.getModelStatus(), highspy.HighsModelStatus
        if status == statuses.kInfeasible:
            return Solved(None, float("inf"))
        info = highs.getInfo()
        bound = info.mip_dual_bound / self.scale * (1 - _TRUST)
        device_of = None
        if info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible):
            values = np.array(highs.getSolution().col_value)
            x = values[: self.first_z].reshape(self.problem.n_items, self.problem.n_devices)
            device_of = x.argmax(axis=1).tolist()
        return Solved(device_of, bound if np.isfinite(bound) else 0.0)
