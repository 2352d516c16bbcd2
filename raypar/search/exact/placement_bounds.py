"""Lower bounds of the largest load of any placement."""

from __future__ import annotations

import numpy as np

from raypar.search.exact.placement_problem import Floats, PlacementProblem


def cpu_capacity(problem: PlacementProblem, seconds: float) -> float:
    """Most accelerator latency that CPUs can take over in so much time, with items divisible."""
    useful = ~problem.only_cpu & (problem.accelerator_s > 0)
    latency, cpu_s = problem.accelerator_s[useful], problem.cpu_s[useful]
    free = float(latency[cpu_s == 0].sum())
    latency, cpu_s = latency[cpu_s > 0], cpu_s[cpu_s > 0]
    order = np.argsort(-latency / cpu_s, kind="stable")
    latency, cpu_s = latency[order], cpu_s[order]
    used = np.concatenate([[0.0], np.cumsum(cpu_s)])
    taken = np.concatenate([[0.0], np.cumsum(latency)])
    return free + float(np.interp(seconds, used, taken))


def divisible_bound(problem: PlacementProblem) -> float:
    """Largest load if work could be divided at will and tensors were free.

    With T, accelerators take k·T latency and CPUs what `cpu_capacity` says; the least T that takes
    all. It is also at least what the dearest item costs where it is cheapest.
    """
    single = least_item(problem)
    foreign = float(problem.cpu_s[problem.only_cpu].sum())
    total = float(problem.accelerator_s[~problem.only_cpu].sum())
    floor = max(single, foreign / problem.cpus if problem.cpus else 0.0)
    if not problem.accelerators and not problem.cpus:
        return floor

    def holds(limit: float) -> bool:
        room = problem.cpus * limit - foreign
        if room < 0:
            return False
        spare = cpu_capacity(problem, room) if problem.cpus else 0.0
        return problem.accelerators * limit + spare >= total

    if holds(floor):
        return floor
    low, high = floor, max(floor, total + foreign, float(problem.cpu_s.sum()), 1e-300)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low


def least_item(problem: PlacementProblem) -> float:
    """The dearest item's cost where it is cheapest."""
    if not problem.n_items:
        return 0.0
    best: Floats = np.full(problem.n_items, np.inf)
    if problem.accelerators:
        fits = ~problem.only_cpu & (problem.size <= problem.memory)
        best = np.where(fits, problem.accelerator_s, best)
    if problem.cpus:
        best = np.minimum(best, problem.cpu_s)
    return float(best.max())
