"""Downsets of an order, as far as they can be the first stages of a good split.

A downset is a set of items that holds, with an item, all that must not come behind it. Dynamic
programming over contiguous splits goes over downsets, of which a branching graph has too many. But
in a split whose largest load is T at most, the first a accelerators take latency a·T at most and
leave no more than (k − a)·T: only downsets inside that *window* matter, and the nearer T is to the
best there is, the narrower it is. Items whose predecessors alone overfill the first part are out,
items whose successors alone overfill the rest are in; the others are decided one by one, for all
downsets at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypar.search.exact.placement_problem import Floats, PlacementProblem

Bools = NDArray[np.bool_]
_SLACK = 1e-9  # relative: what rounding may do to sums
_ROWS = 4096


class TooManyDownsets(Exception):
    """A window holds more downsets than allowed."""


class OutOfTime(Exception):
    """The deadline passed."""


@dataclass(frozen=True)
class Window:
    """Which downsets count.

    Attributes:
        first: Most accelerator latency in the downset, with its crossing cost if `first_pays`.
        rest: Most accelerator latency outside it, with its crossing cost if `rest_pays`.
        first_pays: Whether all devices of the first part are accelerators: each tensor that
            crosses is then paid for by one of them at least.
        rest_pays: The same for the rest.
    """

    first: float
    rest: float
    first_pays: bool
    rest_pays: bool


class Order:
    """An acyclic problem's items in topological order, with all that follows of it.

    Attributes:
        problem: The problem.
        sequence: Items, topologically sorted; branches one after the other as far as possible.
        latency: Accelerator latency of every item, 0 where no accelerator runs it.
        reach: ``reach[u, v]``: v is u, or must not come before u.
        incidence: ``incidence[item, tensor]``: 1 where the tensor holds the item.
    """

    def __init__(self, problem: PlacementProblem) -> None:
        n = problem.n_items
        self.problem = problem
        self.latency: Floats = np.where(problem.only_cpu, 0.0, problem.accelerator_s)
        self.after: list[list[int]] = [[] for _ in range(n)]
        for u, v in sorted(problem.before):
            self.after[u].append(v)
        self.sequence = depth_first(n, self.after)
        self.reach: Bools = np.eye(n, dtype=np.bool_)
        for u in reversed(self.sequence):
            for v in self.after[u]:
                self.reach[u] |= self.reach[v]
        self.incidence = np.zeros((n, len(problem.tensors)), dtype=np.float32)
        for t, items in enumerate(problem.tensors):
            self.incidence[list(items), t] = 1.0

    def downsets(
        self, window: Window, most: int, deadline: float = float("inf"), cut_short: bool = False
    ) -> Bools:
        """The downsets in a window, one row each.

        Args:
            window: Which ones.
            most: Most to look at together.
            deadline: `time.monotonic` after which to give up.
            cut_short: With more, go on with those that cross least, instead of giving up.

        Raises:
            TooManyDownsets: There are more on the way.
            OutOfTime: The deadline passed.
        """
        scale = 1 + _SLACK
        window = Window(
            window.first * scale, window.rest * scale, window.first_pays, window.rest_pays
        )
        forced = self._forced(window)
        if forced is None:
            return np.zeros((0, len(self.sequence)), dtype=np.bool_)
        return _Sweep(self, window, *forced).run(most, deadline, cut_short)

    def _forced(self, window: Window) -> tuple[Bools, Bools] | None:
        """Items that are in every downset of the window, and those in none."""
        foreign = self.problem.only_cpu
        none: Bools = np.zeros(len(foreign), dtype=np.bool_)
        inside: Bools = np.any(self.reach[:, foreign], axis=1) if window.rest_pays else none
        outside: Bools = np.any(self.reach[foreign], axis=0) if window.first_pays else none
        while True:
            if (inside & outside).any():
                return None
            before = self.latency @ (self.reach & ~inside[:, None]) + self.latency[inside].sum()
            behind = (self.reach & ~outside) @ self.latency + self.latency[outside].sum()
            more_outside = outside | (before > window.first)
            more_inside = inside | (behind > window.rest)
            if (more_outside == outside).all() and (more_inside == inside).all():
                return inside, outside
            inside, outside = more_inside, more_outside


class _Sweep:
    """Decides the free items one by one, for all downsets of a window at once.

    A state is two packed sets: what is in, and what is out (with all that is out for it).
    """

    def __init__(self, order: Order, window: Window, inside: Bools, outside: Bools) -> None:
        self.order, self.window, self.inside = order, window, inside
        self.items = [i for i in order.sequence if not inside[i] and not outside[i]]
        self.latency = order.latency[self.items]
        self.base_in = float(order.latency[inside].sum())
        self.base_out = float(order.latency[outside].sum())
        holds_in = inside.astype(np.float32) @ order.incidence > 0
        holds_out = outside.astype(np.float32) @ order.incidence > 0
        part = order.incidence[self.items]
        open_ = (part.sum(axis=0) > 0) & ~(holds_in & holds_out)
        cost = order.problem.cost
        self.crossing = float(cost[holds_in & holds_out].sum())
        self.cost = cost[open_]
        self.incidence = part[:, open_]
        self.holds_in, self.holds_out = holds_in[open_], holds_out[open_]
        self.words = -(-len(self.items) // 64) or 1

    def run(self, most: int, deadline: float, cut_short: bool) -> Bools:
        taken = np.zeros((1, self.words), dtype=np.uint64)
        left = np.zeros((1, self.words), dtype=np.uint64)
        closed = self._packed(self.order.reach[np.ix_(self.items, self.items)])
        checked = 256
        for at in range(len(self.items)):
            word, bit = at // 64, np.uint64(1 << (at % 64))
            free = (left[:, word] & bit) == 0
            more = taken[free]
            more[:, word] |= bit
            left_before = left[free]
            left[free] |= closed[at]
            taken, left = np.concatenate([taken, more]), np.concatenate([left, left_before])
            if len(taken) > 2 * checked:
                if time.monotonic() > deadline:
                    raise OutOfTime
                taken, left, crossing = self._within(taken, left)
                if len(taken) > most:
                    if not cut_short:
                        raise TooManyDownsets
                    kept = np.argsort(crossing, kind="stable")[: most // 2]
                    taken, left = taken[kept], left[kept]
                checked = max(256, len(taken))
        taken, left, _ = self._within(taken, left)
        found = np.tile(self.inside, (len(taken), 1))
        found[:, self.items] = self._unpacked(taken)
        return found

    def _packed(self, rows: Bools) -> NDArray[np.uint64]:
        padded = np.zeros((len(rows), self.words * 64), dtype=np.bool_)
        padded[:, : rows.shape[1]] = rows
        packed: NDArray[np.uint64] = np.packbits(padded, axis=1, bitorder="little").view(np.uint64)
        return packed

    def _unpacked(self, rows: NDArray[np.uint64]) -> NDArray[np.uint8]:
        flat = np.ascontiguousarray(rows).view(np.uint8)
        return np.unpackbits(flat, axis=1, count=len(self.items), bitorder="little")

    def _within(
        self, taken: NDArray[np.uint64], left: NDArray[np.uint64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.uint64], Floats]:
        """The states that can still end inside the window, and what crosses in each."""
        kept, crossings = [], []
        for start in range(0, max(len(taken), 1), _ROWS):
            ins = self._unpacked(taken[start : start + _ROWS])
            outs = self._unpacked(left[start : start + _ROWS])
            crosses = (ins.astype(np.float32) @ self.incidence > 0) | self.holds_in
            crosses &= (outs.astype(np.float32) @ self.incidence > 0) | self.holds_out
            crossing = crosses @ self.cost + self.crossing
            first = ins @ self.latency + self.base_in + self.window.first_pays * crossing
            rest = outs @ self.latency + self.base_out + self.window.rest_pays * crossing
            good = (first <= self.window.first) & (rest <= self.window.rest)
            kept.append(np.flatnonzero(good) + start)
            crossings.append(crossing[good])
        rows = np.concatenate(kept)
        return taken[rows], left[rows], np.concatenate(crossings)


def depth_first(n: int, after: Sequence[Sequence[int]]) -> list[int]:
    """A topological order that follows a branch to where it joins others before it turns back."""
    waiting = [0] * n
    for targets in after:
        for v in targets:
            waiting[v] += 1
    ready = [i for i in reversed(range(n)) if waiting[i] == 0]
    found = []
    while ready:
        u = ready.pop()
        found.append(u)
        for v in reversed(after[u]):
            waiting[v] -= 1
            if waiting[v] == 0:
                ready.append(v)
    return found
