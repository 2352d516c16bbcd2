"""The best contiguous split along given topological orders: quick, and a start for all else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypar.search.exact.placement_downsets import depth_first
from raypar.search.exact.placement_problem import Floats, PlacementProblem


def chain_split(
    problem: PlacementProblem, sequence: Sequence[int], use_all: bool = False
) -> tuple[float, list[int]]:
    """The best split whose stages are intervals of one order.

    Args:
        problem: Its order relations are not looked at.
        sequence: All items.
        use_all: Whether every device gets an item.

    Returns:
        Largest load (infinite if nothing fits) and the device of every item.
    """
    n, k = len(sequence), problem.accelerators
    on_accelerator, on_cpu = _interval_loads(problem, sequence)
    if use_all:
        np.fill_diagonal(on_accelerator, np.inf)
        np.fill_diagonal(on_cpu, np.inf)
    steps: dict[tuple[int, int], tuple[Floats, np.ndarray, np.ndarray]] = {}
    for c in range(problem.cpus + 1):
        for a in range(k + 1):
            best = np.full(n + 1, np.inf)
            best[0] = 0.0 if (a, c) == (0, 0) or not use_all else np.inf
            source = np.zeros(n + 1, dtype=np.int64)
            by_cpu = np.zeros(n + 1, dtype=np.bool_)
            for cell, loads, cpu in (
                ((a - 1, c), on_accelerator, False),
                ((a, c - 1), on_cpu, True),
            ):
                if cell not in steps:
                    continue
                value = np.maximum(steps[cell][0][:, None], loads)
                least = value.argmin(axis=0)
                cost = value[least, np.arange(n + 1)]
                better = cost < best
                best[better], source[better], by_cpu[better] = cost[better], least[better], cpu
            steps[a, c] = (best, source, by_cpu)
    device_of = [0] * n
    a, c, end = k, problem.cpus, n
    objective = float(steps[a, c][0][n])
    while end and np.isfinite(objective):
        start, cpu = int(steps[a, c][1][end]), bool(steps[a, c][2][end])
        a, c = (a, c - 1) if cpu else (a - 1, c)
        for item in sequence[start:end]:
            device_of[item] = k + c if cpu else a
        end = start
    return objective, device_of


def _interval_loads(problem: PlacementProblem, sequence: Sequence[int]) -> tuple[Floats, Floats]:
    """Load of the interval [i, j) of the order on an accelerator and on a CPU; row i, column j.

    Intervals that a device cannot take have infinite load.
    """
    n = len(sequence)
    at = {item: i for i, item in enumerate(sequence)}
    # What intervals do not pay: tensors they hold nothing of, or all of, as corners of rectangles.
    corners = np.zeros((n + 2, n + 2))

    def add(first: int, last: int, low: int, high: int, cost: float) -> None:
        """Adds to rows first..last and columns low..high."""
        corners[first, low] += cost
        corners[last + 1, low] -= cost
        corners[first, high + 1] -= cost
        corners[last + 1, high + 1] += cost

    for items, cost in zip(problem.tensors, problem.cost, strict=True):
        places = sorted(at[i] for i in items)
        add(0, places[0], places[-1] + 1, n, -cost)
        for low, high in zip([-1, *places], [*places, n], strict=True):
            add(low + 1, high, low + 1, high, -cost)
    free = np.cumsum(np.cumsum(corners, axis=0), axis=1)[: n + 1, : n + 1]

    def spans(values: Floats) -> Floats:
        total = np.concatenate([[0.0], np.cumsum(values[list(sequence)])])
        return np.asarray(total[None, :] - total[:, None])

    latency = np.where(problem.only_cpu, 0.0, problem.accelerator_s)
    pays = np.maximum(float(problem.cost.sum()) + free, 0.0)
    on_accelerator = spans(latency) + pays
    on_accelerator[spans(problem.size) > problem.memory] = np.inf
    on_accelerator[spans(problem.only_cpu.astype(np.float64)) > 0] = np.inf
    backwards = np.tril(np.ones((n + 1, n + 1), dtype=np.bool_), -1)
    on_accelerator[backwards] = np.inf
    np.fill_diagonal(on_accelerator, 0.0)
    on_cpu = spans(problem.cpu_s)
    on_cpu[backwards] = np.inf
    return on_accelerator, on_cpu


def orders(problem: PlacementProblem) -> list[list[int]]:
    """Topological orders that suit splits: along branches, level by level, and by what crosses."""
    after: list[list[int]] = [[] for _ in range(problem.n_items)]
    for u, v in sorted(problem.before):
        after[u].append(v)
    return [
        depth_first(problem.n_items, after),
        _least_crossing(problem, after),
        _by_level(problem.n_items, after),
    ]


def _by_level(n: int, after: Sequence[Sequence[int]]) -> list[int]:
    waiting = _waiting(n, after)
    found = [i for i in range(n) if waiting[i] == 0]
    for u in found:  # grows while it is walked
        for v in after[u]:
            waiting[v] -= 1
            if waiting[v] == 0:
                found.append(v)
    return found


def _least_crossing(problem: PlacementProblem, after: Sequence[Sequence[int]]) -> list[int]:
    """Takes next what leaves the least to cross behind it."""
    waiting = _waiting(problem.n_items, after)
    of_item: list[list[int]] = [[] for _ in range(problem.n_items)]
    for t, items in enumerate(problem.tensors):
        for item in items:
            of_item[item].append(t)
    open_ = [len(items) for items in problem.tensors]
    ready = [i for i in range(problem.n_items) if waiting[i] == 0]
    found: list[int] = []
    while ready:

        def grows(item: int) -> float:
            total = 0.0
            for t in of_item[item]:
                first, last = open_[t] == len(problem.tensors[t]), open_[t] == 1
                total += float(problem.cost[t]) * (first - last)
            return total

        item = min(reversed(ready), key=grows)
        ready.remove(item)
        found.append(item)
        for t in of_item[item]:
            open_[t] -= 1
        for v in after[item]:
            waiting[v] -= 1
            if waiting[v] == 0:
                ready.append(v)
    return found


def _waiting(n: int, after: Sequence[Sequence[int]]) -> list[int]:
    waiting = [0] * n
    for targets in after:
        for v in targets:
            waiting[v] += 1
    return waiting
