"""One step of the dynamic program over downsets: all pairs of two lists at once.

The device that takes a split from downset I to downset J ⊇ I pays the latency of J∖I and the cost
of every tensor that it holds in part. It holds nothing of a tensor whose items are as many in I as
in J, and all of it where none is in I and all are in J. Both are products of a feature of I with
one of J, so that the tensors of all pairs are one product of two matrices; inclusion is another.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypar.search.exact.placement_downsets import Bools, Order, OutOfTime
from raypar.search.exact.placement_problem import Floats

_BLOCK = 2_000_000  # pairs that are looked at together


@dataclass(frozen=True)
class Step:
    """What the best predecessors of a list of downsets are.

    Attributes:
        load: Per downset J the least largest load of a split of J.
        previous: Per J the position of the downset I that gives it, -1 without one.
    """

    load: Floats
    previous: NDArray[np.int64]


class Pairs:
    """Steps between two lists of downsets.

    Args:
        order: The order they are downsets of.
        smaller: The downsets I.
        larger: The downsets J.
        deadline: `time.monotonic` after which to give up.
    """

    def __init__(self, order: Order, smaller: Bools, larger: Bools, deadline: float) -> None:
        self.order, self.deadline = order, deadline
        self.smaller, self.larger = smaller, larger
        if not len(smaller) or not len(larger):
            return
        differ = smaller.any(axis=0) | larger.any(axis=0)
        differ &= ~(smaller.all(axis=0) & larger.all(axis=0))
        self.inside = smaller[:, differ].astype(np.float32)
        self.outside = (~larger[:, differ]).astype(np.float32)
        self.constant, self.left, self.right = self._features()

    def _features(self) -> tuple[float, Floats, Floats]:
        """(c, A, B) such that device I → J pays c − (A B)[J, I] for its tensors."""
        order = self.order
        counts_i = (self.smaller.astype(np.float32) @ order.incidence).astype(np.int32)
        counts_j = (self.larger.astype(np.float32) @ order.incidence).astype(np.int32)
        constant = 0.0
        left: list[Floats] = []
        right: list[Floats] = []
        for t, (items, cost) in enumerate(
            zip(order.problem.tensors, order.problem.cost, strict=True)
        ):
            of_i, of_j = counts_i[:, t], counts_j[:, t]
            values = np.flatnonzero(np.bincount(of_i))
            if len(values) == 1 and of_j.min() == of_j.max():
                whole = values[0] == 0 and of_j[0] == len(items)
                constant += 0.0 if of_j[0] == values[0] or whole else float(cost)
                continue
            constant += float(cost)
            for value in values:
                match = of_j == value
                if value == 0:
                    match = match | (of_j == len(items))
                if match.any():
                    left.append(match * cost)
                    right.append((of_i == value).astype(np.float64))
        if not left:
            return constant, np.zeros((len(self.larger), 1)), np.zeros((1, len(self.smaller)))
        return constant, np.stack(left, axis=1), np.stack(right)

    def accelerator(self, load: Floats, limit: float) -> Step:
        """An accelerator as the next device.

        Args:
            load: Largest load of a split of every I.
            limit: Steps that come to more do not count.
        """
        problem = self.order.problem
        foreign = problem.only_cpu.astype(np.float64)
        return self._best(
            load,
            limit,
            self.order.latency,
            [(problem.size, problem.memory), (foreign, 0.0)],
            tensors=True,
        )

    def cpu(self, load: Floats, limit: float) -> Step:
        """A CPU as the next device; see `accelerator`."""
        return self._best(load, limit, self.order.problem.cpu_s, [], tensors=False)

    def _best(
        self,
        load: Floats,
        limit: float,
        seconds: Floats,
        limits: list[tuple[Floats, float]],
        tensors: bool,
    ) -> Step:
        n_i, n_j = len(self.smaller), len(self.larger)
        found = np.full(n_j, np.inf)
        previous = np.full(n_j, -1, dtype=np.int64)
        if not n_i or not n_j:
            return Step(found, previous)
        time_i, time_j = self.smaller @ seconds, self.larger @ seconds
        columns = np.argsort(time_i, kind="stable")
        rows = np.argsort(time_j, kind="stable")
        sorted_i = time_i[columns]
        amounts = [
            (self.smaller @ amount, self.larger @ amount, most)
            for amount, most in limits
            if amount.sum() > most
        ]
        height = max(1, _BLOCK // n_i)
        for start in range(0, n_j, height):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            js = rows[start : start + height]
            slack = 1e-9 * max(limit, 1.0) if np.isfinite(limit) else 0.0
            low = np.searchsorted(sorted_i, time_j[js[0]] - limit - slack)
            high = np.searchsorted(sorted_i, time_j[js[-1]] + slack, side="right")
            at = columns[low:high]
            if not len(at):
                continue
            value = time_j[js, None] - time_i[at]
            if tensors:
                value += self.constant - self.left[js] @ self.right[:, at]
            np.maximum(value, load[at], out=value)
            value[self.outside[js] @ self.inside[at].T > 0] = np.inf
            for of_i, of_j, most in amounts:
                value[of_j[js, None] - of_i[at] > most * (1 + 1e-12)] = np.inf
            best = value.argmin(axis=1)
            least = value[np.arange(len(js)), best]
            good = least <= limit
            found[js[good]] = least[good]
            previous[js[good]] = at[best[good]]
        return Step(found, previous)
