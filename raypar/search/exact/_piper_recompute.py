"""What recomputation costs the stages between downsets, kept as far as that is affordable."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_knapsack import Steps, bounds, solve
from raypar.search.exact._piper_labels import Array, Index
from raypar.search.exact._piper_lattice import Family

_KEPT = 16_000_000
"""Bounds that are kept: two numbers for each (flights, degree, pair of downsets)."""
_MOST_SLOTS = 128
"""(flights, degree) of which steps and bytes are kept."""
_BLOCK = 4096
"""Knapsacks that are looked at at a time."""


class Recompute:
    """Seconds that recomputation adds to a stage, by its flights.

    Args:
        family: The downsets.
        figures: Per tensor-parallel degree.
        memory: Bytes of a device.
    """

    def __init__(self, family: Family, figures: Sequence[DegreeFigures], memory: float) -> None:
        self.family, self.figures, self.memory = family, figures, memory
        self._exactly: dict[tuple[int, int, int, int, int], float] = {}
        n = len(family)
        self._most = _KEPT // (n * n)
        self._slots: dict[int, int] = {}
        width = n * n if self._most >= 4 else 0
        self._low, self._high = np.zeros((0, width)), np.zeros((0, width))
        steps = max(sum(max(len(v) - 1, 0) for v in f.variants) for f in figures) or 1
        self._layer, self._kind = (np.zeros((0, steps), np.int64) for _ in range(2))
        self._cost, self._saving = (np.zeros((0, steps)) for _ in range(2))
        self._fast, self._lean = (np.zeros((0, n)) for _ in range(2))

    def bounds(self, low: Index, high: Index, degree: Index, flights: Index) -> tuple[Array, Array]:
        """(no more than needed, enough) per stage; infinite where no variants fit.

        Where variants of a layer differ in more than seconds and memory, nothing is known to be
        enough: `exactly` tells.
        """
        codes = flights * len(self.figures) + degree
        slot = self._slot_of(codes)
        if self._most < 4:
            return self._fresh(low, high, slot)
        pair = low * len(self.family) + high
        least = self._low[slot, pair]
        unknown = np.flatnonzero(np.isnan(least))
        if len(unknown):
            found = self._fresh(low[unknown], high[unknown], slot[unknown])
            at = (slot[unknown], pair[unknown])
            self._low[at], self._high[at] = found
            least[unknown] = found[0]
        return least, self._high[slot, pair]

    def _slot_of(self, codes: Index) -> Index:
        """Numbers of (flights, degree), under which steps, bytes and bounds are kept."""
        listed = codes.tolist()
        missing = set(listed) - self._slots.keys()
        if missing:
            if len(self._slots) + len(missing) > max(self._most, _MOST_SLOTS):
                self._slots.clear()
                self._low[:] = np.nan
                missing = set(listed)
            for code in sorted(missing):
                self._slots[code] = len(self._slots)
                self._prepare(self._slots[code], code)
        slots = self._slots
        return np.array([slots[code] for code in listed])

    def _prepare(self, slot: int, code: int) -> None:
        """Fills the tables of a slot."""
        if slot >= len(self._cost):
            more = max(len(self._cost), 8)
            for name in ("_layer", "_cost", "_saving", "_kind", "_fast", "_lean"):
                old = getattr(self, name)
                setattr(
                    self, name, np.concatenate([old, np.zeros((more, old.shape[1]), old.dtype)])
                )
            if self._most >= 4:
                unknown = np.full((more, self._low.shape[1]), np.nan)
                self._low = np.concatenate([self._low, unknown])
                self._high = np.concatenate([self._high, unknown])
        flights, degree = divmod(code, len(self.figures))
        figures = self.figures[degree]
        self._fast[slot], self._lean[slot] = figures.bytes_of(flights)
        steps = figures.steps(flights)
        n = len(steps.layer)
        # What is missing to the longest list of steps saves nothing and costs nothing.
        self._layer[slot], self._cost[slot], self._saving[slot], self._kind[slot] = 0, 0, 0, -2
        self._layer[slot, :n], self._cost[slot, :n] = steps.layer, steps.cost
        self._saving[slot, :n], self._kind[slot, :n] = steps.saving, steps.kind

    def _fresh(self, low: Index, high: Index, slot: Index) -> tuple[Array, Array]:
        need = self._fast[slot, high] - self._fast[slot, low] - self.memory
        impossible = self._lean[slot, high] - self._lean[slot, low] > self.memory * (1 + 1e-12)
        least = np.where(impossible, np.inf, 0.0)
        enough = least.copy()
        hard = np.flatnonzero((need > 0) & ~impossible)
        for at in range(0, len(hard), _BLOCK):
            which = hard[at : at + _BLOCK]
            inside = self.family.members[high[which]] & ~self.family.members[low[which]]
            s = slot[which]
            steps = Steps(self._layer[s], self._cost[s], self._saving[s], self._kind[s])
            least[which], enough[which] = bounds(steps, inside, need[which])
        for number, figures in enumerate(self.figures):
            if not figures.exact:
                codes = np.fromiter(self._slots, np.int64)[slot]
                enough[codes % len(self.figures) == number] = np.inf
        return least, enough

    def exactly(
        self,
        low: int,
        high: int,
        replicas: int,
        degree: int,
        flights: int,
        load: tuple[float, float],
    ) -> float:
        """Seconds that recomputation adds, exactly; infinite where no variants fit.

        Args:
            low: The downset before the stage.
            high: The one with it.
            replicas: d.
            degree: Number of the tensor-parallel degree.
            flights: Microbatches in flight.
            load: The stage's (divided, whole).
        """
        figures = self.figures[degree]
        key = (low, high, degree, flights, 0 if figures.exact else replicas)
        if key not in self._exactly:
            found = self.choose(low, high, replicas, degree, flights)
            extra = math.inf
            if found is not None:
                extra = (figures.load(*found, replicas) - load[1]) * replicas - load[0]
            self._exactly[key] = extra
            slot = self._slots.get(flights * len(self.figures) + degree)
            if figures.exact and slot is not None and self._most >= 4:
                pair = low * len(self.family) + high
                self._low[slot, pair] = self._high[slot, pair] = extra
        return self._exactly[key]

    def choose(
        self, low: int, high: int, replicas: int, degree: int, flights: int
    ) -> tuple[list[int], list[int]] | None:
        """(positions of a stage's layers, the best variant of each); None where nothing fits."""
        positions = self.family.between(low, high)
        choices = self.figures[degree].weighed(positions, replicas, flights)
        picks = solve(choices, self.memory)
        return None if picks is None else (positions, picks)
