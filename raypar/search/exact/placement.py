"""Places an operator graph on devices: the best contiguous split, and a placement of any form.

The published problem of Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of DNN
Graph Operators" (NeurIPS): the least largest load of a device. `solve_placement` is the door; the
parts are `placement_contiguous` (dynamic programming over downsets), `placement_local` (local
search) and `placement_milp` (integer program, which gives the bound).
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass

from raypar.errors import PlanError
from raypar.graph._workloads_placement import PlacementWorkload, check_devices
from raypar.search.exact.placement_bounds import divisible_bound
from raypar.search.exact.placement_contiguous import Contiguous, best_contiguous
from raypar.search.exact.placement_local import local_search
from raypar.search.exact.placement_milp import PlacementProgram
from raypar.search.exact.placement_problem import (
    PlacementProblem,
    by_item,
    by_node,
    problem_of,
)
from raypar.search.exact.placement_reduce import reduced

DEFAULT_SECONDS = 48.0
_FOR_CONTIGUOUS = 0.45  # share of the time
_FOR_PROGRAM = ((3_500, 0.7), (30_000, 0.4), (math.inf, 0.0))
"""(Size of the integer program at most, its share of the time that is left.)"""
_FIRST_STEPS, _MOST_STEPS, _STEPS_PER_ITEM = 20_000, 320_000, 40  # of local search, per level
_IDLE = 6  # local searches in a row without gain, after which the program has its turn
_CLOSE = 1 + 2e-6  # nothing is to be gained where the bound is so near


@dataclass(frozen=True)
class Placed:
    """A placement and what is known of better ones.

    Attributes:
        objective: Largest load, in the input's unit of time.
        bound: No placement of this kind has a smaller one.
        device_of: Device of every node, by position in the workload: accelerators from 0, then
            CPUs.
    """

    objective: float
    bound: float
    device_of: tuple[int, ...]

    @property
    def gap(self) -> float:
        """Most that could be gained, as a share of the bound."""
        return self.objective / self.bound - 1 if self.bound > 0 else 0.0


@dataclass(frozen=True)
class PlacementSolution:
    """What `solve_placement` found.

    Attributes:
        contiguous: A contiguous split, the best one if its bound equals its objective; None where
            the devices' memory allows none.
        noncontiguous: A placement of any form.
    """

    contiguous: Placed | None
    noncontiguous: Placed


def solve_placement(
    work: PlacementWorkload, seconds: float = DEFAULT_SECONDS, threads: int = 1
) -> PlacementSolution:
    """Finds the best contiguous split and a good placement of any form.

    Args:
        work: The graph and the devices.
        seconds: About the most wall-clock time to take; much less where optima are proved.
        threads: Of the integer program's solver.

    Raises:
        PlanError: No device can hold some nodes, or the devices cannot hold all of them.
    """
    check_devices(work)
    deadline = time.monotonic() + seconds
    problem = problem_of(work)
    split = best_contiguous(problem, seconds * _FOR_CONTIGUOUS)
    free = _Free(problem, split, deadline, threads).solve()
    contiguous = None
    if math.isfinite(split.objective):
        contiguous = Placed(split.objective, split.bound, _listed(split.device_of))
    return PlacementSolution(contiguous, free)


def _listed(device_of: dict[int, int]) -> tuple[int, ...]:
    return tuple(device_of[node] for node in range(len(device_of)))


class _Free:
    """The search for a placement of any form."""

    def __init__(
        self, problem: PlacementProblem, split: Contiguous, deadline: float, threads: int
    ) -> None:
        self.problem, self.deadline, self.threads = problem, deadline, threads
        self.bound = divisible_bound(problem)
        self.objective = split.objective
        self.device_of = split.device_of
        if not math.isfinite(split.objective):
            self._pack()

    def solve(self) -> Placed:
        """The best placement in the time there is."""
        rest = self.deadline - time.monotonic()
        size = self._program_size()
        share = next(share for most, share in _FOR_PROGRAM if size <= most)
        until = self.deadline - share * rest
        steps, idle = max(_FIRST_STEPS, _STEPS_PER_ITEM * self.problem.n_items), 0
        for seed in itertools.count():
            before = self.objective
            self._search(steps, seed, until)
            idle = 0 if self.objective < before else idle + 1
            if self.done or time.monotonic() >= until or (share and idle == _IDLE):
                break
            steps = min(2 * steps, _MOST_STEPS)
        if share:
            self._program(self.deadline - time.monotonic())
        return Placed(self.objective, min(self.bound, self.objective), _listed(self.device_of))

    @property
    def done(self) -> bool:
        """Whether the placement is known to be the best."""
        return self.objective <= self.bound * _CLOSE

    def _pack(self) -> None:
        """A first placement within memory: large items first, each where most room is left.

        Raises:
            PlanError: There is none; the integer program has proved it, or found none in time.
        """
        problem = self.problem
        room = [problem.memory] * problem.accelerators
        device_of = [problem.accelerators] * problem.n_items
        packed = True
        for item in sorted(range(problem.n_items), key=lambda i: -problem.size[i]):
            device = max(range(len(room)), key=lambda d: room[d], default=None)
            if device is None or problem.size[item] > room[device]:
                packed = False
                break
            room[device] -= problem.size[item]
            device_of[item] = device
        if not packed:
            solved = PlacementProgram(problem).solve(self.deadline - time.monotonic(), self.threads)
            if solved.device_of is None:
                total = float(problem.size.sum())
                raise PlanError(
                    f"the nodes take {total:.6g} bytes, {problem.accelerators} accelerators "
                    f"have {problem.memory:.6g} each, and there is no CPU: no placement that fits "
                    f"was found; set maxSizePerFPGA to {total:.6g}, or maxCPUs to 1"
                )
            device_of = solved.device_of
        self.device_of = by_node(problem, device_of)
        self.objective = problem.objective(device_of)

    def _search(self, steps: int, seed: int, until: float) -> None:
        if self.done:
            return
        smaller = reduced(self.problem, self.objective, contiguous=False)
        start = self._on(smaller)
        if start is None:
            return
        found = local_search(smaller, start, until, steps, seed)
        self._take(smaller, found.device_of)

    def _program_size(self) -> int:
        smaller = reduced(self.problem, self.objective, contiguous=False)
        tensors = sum(len(items) for items in smaller.tensors)
        return smaller.n_items * smaller.n_devices + 2 * tensors * smaller.accelerators

    def _program(self, seconds: float) -> None:
        """Solves the program of what can be better than the best placement so far."""
        if self.done or seconds <= 0:
            return
        limit = self.objective
        smaller = reduced(self.problem, limit, contiguous=False)
        solved = PlacementProgram(smaller, self._on(smaller)).solve(seconds, self.threads)
        if solved.device_of is not None:
            self._take(smaller, solved.device_of)
        self.bound = max(self.bound, min(limit, solved.bound))

    def _on(self, smaller: PlacementProblem) -> list[int] | None:
        """The best placement so far, as one of a reduced problem; None if that does not fit it.

        Reduction joins items that a better placement keeps together; this one may not. Then all
        of them go where the first of them is.
        """
        device_of = by_item(smaller, self.device_of)
        for item in smaller.only_cpu.nonzero()[0]:
            device_of[item] = max(device_of[item], smaller.accelerators)
        return device_of if smaller.fits(device_of) else None

    def _take(self, smaller: PlacementProblem, device_of: list[int]) -> None:
        nodes = by_node(smaller, device_of)
        objective = self.problem.objective(by_item(self.problem, nodes))
        if objective < self.objective:
            self.objective, self.device_of = objective, nodes
