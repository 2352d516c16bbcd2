"""Local search for placements of any form: items move between devices while the largest load falls.

Simulated annealing over moves and swaps, first of clusters of items that dear tensors join, then
of ever smaller ones down to single items (the idea of multilevel partitioning, Hendrickson and
Leland 1995). A state is judged by the sum over devices of (load ÷ scale)ᵖ: with a large p this is
the largest load, and tells states apart in which several devices are equally full.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from raypar.search.exact.placement_problem import PlacementProblem

_POWER = 24.0
_STEPS_PER_MOVE = 300  # there are items × devices moves
_SMALLEST = 12  # clusters per device at least
_SHRINK_LEAST = 0.95  # a level with a larger share of the clusters of the one below is none
_HOT, _COLD = 0.03, 1e-4  # by what share a step may worsen the objective, at first and at last


@dataclass(frozen=True)
class Found:
    """A placement.

    Attributes:
        objective: Its largest load.
        device_of: Device of every item.
    """

    objective: float
    device_of: list[int]


class _State:
    """Loads of one placement, kept up to date move by move.

    For every tensor the number of its items on every device is kept; a device pays for a tensor
    while it holds some of its items and not all.
    """

    def __init__(self, problem: PlacementProblem, device_of: Sequence[int]) -> None:
        self.device_of = list(device_of)
        self.accelerators = problem.accelerators
        self.memory = problem.memory
        self.latency = problem.accelerator_s.tolist()
        self.cpu_s = problem.cpu_s.tolist()
        self.size = problem.size.tolist()
        self.only_cpu = problem.only_cpu.tolist()
        self.cost = problem.cost.tolist()
        self.items_of = [len(items) for items in problem.tensors]
        self.tensors_of: list[list[int]] = [[] for _ in self.device_of]
        self.held = [[0] * problem.n_devices for _ in problem.tensors]
        for t, items in enumerate(problem.tensors):
            for item in items:
                self.tensors_of[item].append(t)
                self.held[t][self.device_of[item]] += 1
        self.load = problem.loads(self.device_of).tolist()
        self.bytes = [0.0] * problem.n_devices
        for item, device in enumerate(self.device_of):
            self.bytes[device] += self.size[item]

    def allows(self, item: int, device: int) -> bool:
        """Whether the device can run the item beside all that it holds."""
        if device >= self.accelerators:
            return True
        return not self.only_cpu[item] and self.bytes[device] + self.size[item] <= self.memory

    def changes(self, item: int, to: int) -> tuple[float, float]:
        """By how much the loads of an item's device and of another change if it goes there.

        No other device's load changes: it pays for a tensor of which it holds some items, and the
        item that moves is on another device before and after.
        """
        here = self.device_of[item]
        leaves = arrives = 0.0
        held, items_of, cost = self.held, self.items_of, self.cost
        for t in self.tensors_of[item]:
            row, price, whole = held[t], cost[t], items_of[t]
            mine, theirs = row[here], row[to]
            if mine == whole:
                if mine > 1:
                    leaves += price
            elif mine == 1:
                leaves -= price
            if theirs == whole - 1:
                if theirs:
                    arrives -= price
            elif theirs == 0:
                arrives += price
        accelerators = self.accelerators
        if here < accelerators:
            leaves -= self.latency[item]
        else:
            leaves = -self.cpu_s[item]
        if to < accelerators:
            arrives += self.latency[item]
        else:
            arrives = self.cpu_s[item]
        return leaves, arrives

    def move(self, item: int, to: int, leaves: float, arrives: float) -> None:
        """Moves an item; the changes are those that `changes` told."""
        here = self.device_of[item]
        for t in self.tensors_of[item]:
            row = self.held[t]
            row[here] -= 1
            row[to] += 1
        self.load[here] += leaves
        self.load[to] += arrives
        self.bytes[here] -= self.size[item]
        self.bytes[to] += self.size[item]
        self.device_of[item] = to


class _Annealing:
    """One run on one level."""

    def __init__(
        self, problem: PlacementProblem, start: Sequence[int], seed: int, scale: float
    ) -> None:
        self.problem, self.scale = problem, scale
        self.state = _State(problem, start)
        self.random = random.Random(seed)
        self.best = Found(max(self.state.load), list(start))
        self.neighbours: list[list[int]] = [[] for _ in range(problem.n_items)]
        for items in problem.tensors:
            for item in items[:8]:
                self.neighbours[item] += [other for other in items[:8] if other != item]

    def run(self, steps: int, hot: float, cold: float, deadline: float) -> Found:
        """Anneals from one temperature to another, both as shares of the objective."""
        state, rng, scale = self.state, self.random, self.scale
        n, devices = self.problem.n_items, self.problem.n_devices
        load = state.load
        value = self._value()
        cooling = (cold / hot) ** (1.0 / max(steps, 1))
        temperature = hot
        best = self.best.objective
        for step in range(steps):
            temperature *= cooling
            if step % 512 == 0:
                if time.monotonic() > deadline:
                    break
                value = self._value()
            item = int(rng.random() * n)
            near = self.neighbours[item]
            if near and rng.random() < 0.75:
                to = state.device_of[near[int(rng.random() * len(near))]]
            else:
                to = int(rng.random() * devices)
            here = state.device_of[item]
            if to == here or not state.allows(item, to):
                continue
            leaves, arrives = state.changes(item, to)
            one, two = load[here] + leaves, load[to] + arrives
            new = (
                value
                - (load[here] / scale) ** _POWER
                - (load[to] / scale) ** _POWER
                + (max(one, 0.0) / scale) ** _POWER
                + (max(two, 0.0) / scale) ** _POWER
            )
            if new > value and not self._accepts(value, new, temperature):
                if rng.random() < 0.3:
                    value = self._swap(item, to, leaves, arrives, value, temperature)
                    if max(load) < best * (1 - 1e-12):
                        best = self._keep()
                continue
            state.move(item, to, leaves, arrives)
            value = new
            if one < best and two < best and max(load) < best * (1 - 1e-12):
                best = self._keep()
        return self.best

    def _value(self) -> float:
        return sum((max(x, 0.0) / self.scale) ** _POWER for x in self.state.load)

    def _accepts(self, value: float, new: float, temperature: float) -> bool:
        """Metropolis' rule for the p-norm, relative to itself."""
        if value <= 0:
            return False
        worse = (new / value) ** (1 / _POWER) - 1
        return self.random.random() < math.exp(-worse / temperature)

    def _swap(
        self, item: int, to: int, leaves: float, arrives: float, value: float, temperature: float
    ) -> float:
        """Moves an item, and one of the other device back; takes both back if that is no good."""
        state = self.state
        here = state.device_of[item]
        others = self._some_on(to)
        if others is None:
            return value
        if to < state.accelerators and state.only_cpu[item]:
            return value
        state.move(item, to, leaves, arrives)
        back, there = state.changes(others, here)
        if state.allows(others, here):
            state.move(others, here, back, there)
            new = self._value()
            if new <= value or self._accepts(value, new, temperature):
                return new
            again = state.changes(others, to)
            state.move(others, to, *again)
        again = state.changes(item, here)
        state.move(item, here, *again)
        return value

    def _some_on(self, device: int) -> int | None:
        """A random item on a device, if a few draws find one."""
        n = self.problem.n_items
        for _ in range(3 * self.problem.n_devices):
            item = int(self.random.random() * n)
            if self.state.device_of[item] == device:
                return item
        return None

    def _keep(self) -> float:
        exact = self.problem.objective(self.state.device_of)
        if exact < self.best.objective:
            self.best = Found(exact, list(self.state.device_of))
        return self.best.objective


def _levels(problem: PlacementProblem, device_of: Sequence[int]) -> list[list[int]]:
    """Coarser and coarser groupings of the items: per level the cluster of every item.

    Clusters are pairs of clusters of the level below that share the dearest tensors for what they
    take, and are on one device.
    """
    found: list[list[int]] = []
    current = problem
    cluster_of = list(range(problem.n_items))
    devices = list(device_of)
    while current.n_items > _SMALLEST * problem.n_devices:
        group_of = _matched(current, devices)
        number: dict[int, int] = {}
        new = [number.setdefault(group, len(number)) for group in group_of]
        if len(number) > _SHRINK_LEAST * current.n_items:
            break
        current = current.merged(group_of)
        devices = [devices[group] for group in number]
        cluster_of = [new[c] for c in cluster_of]
        found.append(cluster_of)
    return found


def _matched(problem: PlacementProblem, device_of: Sequence[int]) -> list[int]:
    """Pairs of items of one device with the dearest tensors for their latency."""
    shared: dict[tuple[int, int], float] = {}
    for items, cost in zip(problem.tensors, problem.cost.tolist(), strict=True):
        share = cost / (len(items) - 1)
        for p in items[1:9]:
            shared[items[0], p] = shared.get((items[0], p), 0.0) + share
    mean = float(problem.accelerator_s.mean()) or 1.0
    latency = problem.accelerator_s.tolist()
    most = float(problem.accelerator_s.sum()) / max(problem.n_devices * 4, 1)
    ranked = sorted(
        shared,
        key=lambda pair: -shared[pair] / (mean + latency[pair[0]] + latency[pair[1]]),
    )
    group = list(range(problem.n_items))
    taken = [False] * problem.n_items
    for p, q in ranked:
        if taken[p] or taken[q] or device_of[p] != device_of[q]:
            continue
        if latency[p] + latency[q] > most:
            continue
        taken[p] = taken[q] = True
        group[q] = group[p]
    return group


def local_search(
    problem: PlacementProblem, start: Sequence[int], deadline: float, steps: int, seed: int = 0
) -> Found:
    """A placement at least as good as a given one.

    Args:
        problem: The problem.
        start: Device of every item; it fits.
        deadline: `time.monotonic` after which to stop.
        steps: Most moves to try on each level; fewer where there are few items.
        seed: Of its random choices: equal inputs give equal placements, unless time runs out.
    """
    best = Found(problem.objective(start), list(start))
    for cluster_of in reversed([list(range(problem.n_items)), *_levels(problem, start)]):
        coarse = problem.merged(cluster_of)
        first: dict[int, int] = {}
        for item, cluster in enumerate(cluster_of):
            first.setdefault(cluster, item)
        number = {cluster: i for i, cluster in enumerate(first)}
        # Clusters of a level are parts of those of the level before, and so on one device.
        begin = [best.device_of[item] for item in first.values()]
        run = _Annealing(coarse, begin, seed, best.objective or 1.0)
        enough = _STEPS_PER_MOVE * coarse.n_items * coarse.n_devices
        result = run.run(min(steps, enough), _HOT, _COLD, deadline)
        if result.objective < best.objective:
            device_of = [result.device_of[number[c]] for c in cluster_of]
            best = Found(result.objective, device_of)
    return best
