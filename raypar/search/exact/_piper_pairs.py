"""Stages that may be put in front of labels: figures from a table, or worked out as needed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_labels import Array, Index, Pending
from raypar.search.exact._piper_settling import Settling

_TABLED = 48
"""Flights up to which the memory of all pairs is looked at."""
_BLOCK = 3_000_000
"""Pairs that are looked at at a time."""


class Pairs(ABC):
    """Where a sweep gets its stages from.

    Args:
        sweep: The sweep.
    """

    def __init__(self, sweep: Settling) -> None:
        self.sweep = sweep

    def prepare(self) -> None:  # noqa: B027 (some have nothing to prepare)
        """Called when the bound has changed."""

    @abstractmethod
    def in_front_of(self, rows: Index) -> Pending | None:
        """Stages that begin at some downsets of one size and end at labels; None if none can.

        Args:
            rows: The downsets before the stages.
        """


class PairTable(Pairs):
    """Figures of all pairs of downsets, worked out once."""

    def __init__(self, sweep: Settling) -> None:
        super().__init__(sweep)
        every = np.arange(len(sweep.family))
        members = sweep.family.members.astype(np.float64)
        inside = (members @ (1.0 - members).T) == 0
        np.fill_diagonal(inside, False)
        found: list[list[Array]] = []
        for figures in sweep.figures:
            weighted = members[:, figures.source] * (figures.into + figures.out)
            skipped = weighted @ (1.0 - members[:, figures.target]).T
            stages = figures.stages(every[:, None], every[None, :], skipped)
            most, easy = stages.most_flights, stages.easy_flights
            _narrow(figures, most, easy, min(sweep.setting.devices, _TABLED))
            divided = np.where(inside & (most >= 1), stages.divided, np.inf)
            found.append([divided, stages.whole, most, easy])
        self.divided, self.whole, self.most, self.easy = (
            np.stack(parts) for parts in zip(*found, strict=True)
        )

    def prepare(self) -> None:
        """Works out every stage's fewest replicas."""
        self._number = self.sweep.number(self.divided, self.whole)
        if len(self.sweep.figures) > 1:
            self.sweep.rest = np.maximum(self.sweep.rest, self._completions())

    def _completions(self) -> Index:
        """Per downset the devices that its layers take at least, whatever stages lie behind it.

        Every stage is given as few flights as the replicas behind it allow, and the seconds of
        recomputation that its knapsack is known to need.
        """
        sweep = self.sweep
        n, allowed = len(sweep.family), len(sweep.replicas)
        behind = sweep.replicas_behind()
        degree, low, high = np.nonzero(self._number < allowed)
        number = self._number[degree, low, high]
        at = (degree, low, high)
        divided, whole, easy, most = (
            table[at] for table in (self.divided, self.whole, self.easy, self.most)
        )
        after = behind[high]
        number = np.maximum(number, sweep.lifted(after, most))
        devices = np.full((len(sweep.figures), n, n), np.iinfo(np.int32).max, np.int64)
        which = np.flatnonzero(number < allowed)
        while len(which):
            d = sweep.replicas[number[which]]
            flights = 1 - (-after[which] // d)
            extra = np.zeros(len(which))
            hard = np.flatnonzero(flights > easy[which])
            if len(hard):
                w = which[hard]
                stages = (low[w], high[w], degree[w], flights[hard])
                extra[hard] = sweep.recompute.bounds(*stages)[0]
            good = (divided[which] + extra) / d + whole[which] <= sweep.bound
            done = which[good]
            devices[degree[done], low[done], high[done]] = d[good] * sweep.degrees[degree[done]]
            which = which[~good]
            number[which] += 1
            which = which[number[which] < allowed]
        least = devices.min(axis=0)
        needed = np.full(n, np.iinfo(np.int32).max, np.int64)
        needed[n - 1] = 0
        for one in range(n - 2, -1, -1):
            needed[one] = (needed + least[:, one]).min()
        return needed

    def in_front_of(self, rows: Index) -> Pending | None:
        """See `Pairs.in_front_of`."""
        sweep, labels = self.sweep, self.sweep.labels
        if not len(rows):
            return None
        high = labels.down[: labels.count]
        number = self._number[:, rows[:, None], high[None, :]]
        degree, row, label = np.nonzero(number < len(sweep.replicas))
        number, low = number[degree, row, label], rows[row]
        if not len(low):
            return None
        at = (degree, low, high[label])
        pending = Pending(
            low, label, degree, number, self.divided[at], self.whole[at], self.easy[at]
        )
        return sweep.ready(pending, self.most[at])


def _narrow(figures: DegreeFigures, most: Array, easy: Array, flights: int) -> None:
    """Makes the flights of all pairs exact, up to a number of them.

    The bytes of every layer's leanest variant grow with the flights, but not along a line.
    """
    lean_fits, fast_fits = np.zeros_like(most), np.zeros_like(easy)
    memory = figures.setting.memory
    for y in range(1, flights + 1):
        fast, lean = figures.bytes_of(y)
        fits = lean[None, :] - lean[:, None] <= memory * (1 + 1e-12)
        if not np.tril(fits, -1).any():  # smaller downsets come later
            break
        lean_fits += fits
        fast_fits += fast[None, :] - fast[:, None] <= memory * (1 - 1e-14)
    np.copyto(most, np.minimum(most, np.where(lean_fits < flights, lean_fits, most)))
    np.copyto(easy, np.where(fast_fits < flights, fast_fits, np.maximum(easy, fast_fits)))


class FreshPairs(Pairs):
    """Figures of the pairs that the devices left allow, worked out when they are asked for."""

    def in_front_of(self, rows: Index) -> Pending | None:
        """See `Pairs.in_front_of`."""
        sweep, labels = self.sweep, self.sweep.labels
        if not len(rows):
            return None
        found: list[Pending] = []
        high = labels.down[: labels.count]
        # A stage uses no fewer devices than its least work over the bound.
        key = sweep.least_work[high] + sweep.bound * labels.devices[: labels.count]
        order = np.argsort(key, kind="stable")
        limit = sweep.bound * (sweep.setting.devices - sweep.rest[rows]) + sweep.least_work[rows]
        ends = np.searchsorted(key[order], limit * (1 + 1e-12), "right")
        step = max(1, _BLOCK // max(int(ends.max(initial=0)), 1))
        for at in range(0, len(rows), step):
            sweep.clock()
            part, end = rows[at : at + step], ends[at : at + step]
            width = int(end.max(initial=0))
            near = order[:width]
            nested = np.arange(width)[None, :] < end[:, None]
            for word in sweep.family.words.T:
                nested &= (word[part][:, None] & ~word[high[near]][None, :]) == 0
            row, column = np.nonzero(nested)
            for degree in range(len(sweep.figures)):
                ready = self._stages(part[row], near[column], degree)
                if ready is not None:
                    found.append(ready)
        return Pending.joined(found) if found else None

    def _stages(self, low: Index, label: Index, degree: int) -> Pending | None:
        sweep, figures = self.sweep, self.sweep.figures[degree]
        high = sweep.labels.down[label]
        whole = sweep.setting.sync * (figures.parameters[high] - figures.parameters[low])
        rough = figures.seconds[high] - figures.seconds[low] - whole  # without edges
        keep = sweep.fits(low, label, np.full(len(low), degree), sweep.number(rough, whole))
        low, label, high = low[keep], label[keep], high[keep]
        if not len(low):
            return None
        stages = figures.stages(low, high)
        number = sweep.number(stages.divided, stages.whole)
        degrees = np.full(len(low), degree)
        pending = Pending(
            low, label, degrees, number, stages.divided, stages.whole, stages.easy_flights
        )
        return sweep.ready(pending, stages.most_flights)
