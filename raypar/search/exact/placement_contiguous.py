"""The best contiguous split: dynamic programming over the downsets that matter.

After Tarnawski et al. 2020, "Efficient Algorithms for Device Placement of DNN Graph Operators"
(NeurIPS), section 5.1: the largest load of a split of downset J over a accelerators and c CPUs is
the least, over downsets I ⊆ J, of the larger of that of I over one device less and of the load of
J∖I on it. The recurrence is theirs. Here it is solved for a limit T that rises from a lower bound:
a small T leaves narrow windows of downsets and joins many items (`placement_downsets`,
`placement_reduce`). The first T below which there is a split gives the best one; every T before it
is a lower bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from raypar.search.exact.placement_bounds import cpu_capacity, divisible_bound
from raypar.search.exact.placement_chain import chain_split, orders
from raypar.search.exact.placement_downsets import (
    Bools,
    Order,
    OutOfTime,
    TooManyDownsets,
    Window,
)
from raypar.search.exact.placement_pairs import Pairs, Step
from raypar.search.exact.placement_problem import (
    Floats,
    PlacementProblem,
    by_item,
    by_node,
)
from raypar.search.exact.placement_reduce import reduced, together

_FIRST_SHARES = (0.005, 0.01, 0.02, 0.04, 0.08)
_GROWTH = 1.04
"""Limits lie over the lower bound by the first shares, then each over the one before by this."""
_MOST = 120_000  # downsets of one window
_MOST_BITS = 40_000_000  # downsets of one window × items
_BEAMS = (500, 2_000, 8_000)  # downsets of one window where all are too many
_CLOSE = 1.02  # a limit so near to the best known split is not worth a run of its own
_FOR_PROOF = 0.6  # share of the time; the rest is for splits without proof


@dataclass(frozen=True)
class Contiguous:
    """A contiguous split.

    Attributes:
        objective: Its largest load; infinite if there is none.
        device_of: Device of every node, by position in the workload.
        bound: A lower bound of the largest load of every contiguous split.
    """

    objective: float
    device_of: dict[int, int]
    bound: float

    @property
    def exact(self) -> bool:
        """Whether it is the best there is."""
        return self.objective <= self.bound * (1 + 1e-12)


def best_contiguous(problem: PlacementProblem, seconds: float, most: int = _MOST) -> Contiguous:
    """The best contiguous split, or the best found within some time.

    Args:
        problem: The problem.
        seconds: About the most time to take, wall clock.
        most: Most downsets of one window.
    """
    start = time.monotonic()
    deadline = start + seconds
    base = together(problem)
    least = divisible_bound(base)
    best = replace(_along_orders(base), bound=least)
    for limit in _limits(least, best.objective):
        if best.exact:
            return best
        try:
            found = _below(base, limit, most, start + _FOR_PROOF * seconds)
        except (TooManyDownsets, OutOfTime):
            return _by_beams(base, best, deadline)
        if found is not None:
            return Contiguous(found[0], found[1], found[0])
        best = replace(best, bound=max(best.bound, limit))
    return best


def _limits(least: float, known: float) -> Iterator[float]:
    """Limits that rise from a lower bound to a split that is known; that is the last one."""
    shares = iter(_FIRST_SHARES)
    limit = least
    while True:
        share = next(shares, None)
        limit = limit * _GROWTH if share is None else least * (1 + share)
        if limit * _CLOSE >= known or limit <= 0:
            yield known
            return
        yield limit


def _along_orders(base: PlacementProblem) -> Contiguous:
    """The best split along a few orders; again with items joined, which changes the orders."""
    best = Contiguous(float("inf"), dict.fromkeys(by_node(base, [0] * base.n_items), 0), 0.0)
    problem = base
    for _ in range(2):
        for sequence in orders(problem):
            objective, device_of = chain_split(problem, sequence)
            if objective < best.objective:
                exact = problem.objective(device_of)  # sums of many intervals drift a little
                best = Contiguous(exact, by_node(problem, device_of), 0.0)
        problem = reduced(base, best.objective, contiguous=True)
    return best


def _by_beams(base: PlacementProblem, best: Contiguous, deadline: float) -> Contiguous:
    """Goes on with a part of the downsets of every window: better splits, but no proof.

    Low limits come first here as well: the narrower windows are, the more of them a part covers.
    """
    for beam in _BEAMS:
        for limit in _limits(best.bound, best.objective):
            try:
                found = _below(base, limit, beam, deadline, cut_short=True)
            except OutOfTime:
                return best
            if found is not None:
                best = Contiguous(found[0], found[1], best.bound)
                break
    return best


def _below(
    base: PlacementProblem, limit: float, most: int, deadline: float, cut_short: bool = False
) -> tuple[float, dict[int, int]] | None:
    """The best split below a limit, if there is one.

    Raises:
        TooManyDownsets: A window holds more than `most`, and `cut_short` is not set.
        OutOfTime: The deadline passed.
    """
    problem = reduced(base, limit, contiguous=True)
    device_of = _Program(problem, limit, most, deadline, cut_short).solve()
    if device_of is None:
        return None
    nodes = by_node(problem, device_of)
    objective = base.objective(by_item(base, nodes))
    return (objective, nodes) if objective < limit else None


class _Program:
    """The dynamic program for one limit.

    A cell (a, c) holds the downsets that a accelerators and c CPUs may have taken, in any order of
    devices, each with the least largest load.
    """

    def __init__(
        self,
        problem: PlacementProblem,
        limit: float,
        most: int,
        deadline: float,
        cut_short: bool,
    ) -> None:
        self.problem, self.limit = problem, limit
        self.most = min(most, _MOST_BITS // problem.n_items)
        self.deadline, self.cut_short = deadline, cut_short
        self.order = Order(problem)
        self.sets: dict[tuple[int, int], Bools] = {}
        self.loads: dict[tuple[int, int], Floats] = {}
        self.steps: dict[tuple[int, int], tuple[Step | None, Step | None]] = {}

    def solve(self) -> list[int] | None:
        """Device of every item in the best split within the limit; None without one."""
        k, cpus = self.problem.accelerators, self.problem.cpus
        for c in range(cpus + 1):
            for a in range(k + 1):
                self._fill(a, c)
        if not len(self.sets[k, cpus]):
            return None
        return self._backtrack()

    def _fill(self, a: int, c: int) -> None:
        n, k, cpus = self.problem.n_items, self.problem.accelerators, self.problem.cpus
        if (a, c) == (0, 0):
            found: Bools = np.zeros((1, n), dtype=np.bool_)
            self.sets[a, c], self.loads[a, c] = found, np.zeros(1)
            self.steps[a, c] = (None, None)
            return
        if (a, c) == (k, cpus):
            found = np.ones((1, n), dtype=np.bool_)
        else:
            found = self.order.downsets(
                self._window(a, c), self.most, self.deadline, self.cut_short
            )
        by_accelerator = self._step((a - 1, c), found, cpu=False) if a else None
        by_cpu = self._step((a, c - 1), found, cpu=True) if c else None
        load = np.full(len(found), np.inf)
        for step in (by_accelerator, by_cpu):
            if step is not None:
                load = np.minimum(load, step.load)
        kept = load <= self.limit
        self.sets[a, c], self.loads[a, c] = found[kept], load[kept]
        self.steps[a, c] = (_rows(by_accelerator, kept), _rows(by_cpu, kept))

    def _window(self, a: int, c: int) -> Window:
        problem, limit = self.problem, self.limit
        left_a, left_c = problem.accelerators - a, problem.cpus - c
        return Window(
            first=a * limit + (cpu_capacity(problem, c * limit) if c else 0.0),
            rest=left_a * limit + (cpu_capacity(problem, left_c * limit) if left_c else 0.0),
            first_pays=c == 0,
            rest_pays=left_c == 0,
        )

    def _step(self, source: tuple[int, int], found: Bools, cpu: bool) -> Step:
        pairs = Pairs(self.order, self.sets[source], found, self.deadline)
        take = pairs.cpu if cpu else pairs.accelerator
        return take(self.loads[source], self.limit * (1 + 1e-12))

    def _backtrack(self) -> list[int]:
        k = self.problem.accelerators
        device_of = [0] * self.problem.n_items
        a, c, row = k, self.problem.cpus, 0
        while a or c:
            by_accelerator, by_cpu = self.steps[a, c]
            current = self.sets[a, c][row]
            cpu = by_accelerator is None or (
                by_cpu is not None and by_cpu.load[row] < by_accelerator.load[row]
            )
            step = by_cpu if cpu else by_accelerator
            assert step is not None
            a, c = (a, c - 1) if cpu else (a - 1, c)
            row = int(step.previous[row])
            for item in np.flatnonzero(current & ~self.sets[a, c][row]):
                device_of[item] = k + c if cpu else a
        return device_of


def _rows(step: Step | None, kept: Bools) -> Step | None:
    return None if step is None else Step(step.load[kept], step.previous[kept])
