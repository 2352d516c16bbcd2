"""Is there a pipeline with no load above a bound? Dynamic programming over downsets.

Walking from the last stage to the first, what earlier stages feel of the later ones is the sum of
their replicas (through the microbatches in flight) and the devices they use. For a given stage,
tensor-parallel degree and sum, the fewest replicas that keep the bound are best in both, so that
every downset has a short front of labels (`raypar.search.exact._piper_labels`). With one degree
there is one label: both figures are the same.

One bound after the other is tried. Where the fronts of the nearest looser and of the nearest
tighter bound agree, the front between them is known, which soon holds nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_formula import PiperSetting
from raypar.search.exact._piper_labels import Index, Labels, same_front
from raypar.search.exact._piper_lattice import Family
from raypar.search.exact._piper_pairs import FreshPairs, PairTable
from raypar.search.exact._piper_settling import Settling

_DENSE = 1_500_000
"""Up to so many (pair of downsets, degree), figures of all pairs are kept."""


@dataclass(frozen=True)
class Cut:
    """A stage of a pipeline as the search sees it.

    Attributes:
        low: The downset before it.
        high: The downset with it.
        replicas: d.
        degree: Number of its tensor-parallel degree.
        flights: Microbatches in flight.
    """

    low: int
    high: int
    replicas: int
    degree: int
    flights: int


class PiperSweep(Settling):
    """Finds pipelines under a bound on the load, for one workload, family and setting.

    Attributes:
        width: Labels that a downset keeps at most; None: all. With fewer, what is found is a
            pipeline, but where none is found there may be one.
    """

    def __init__(
        self,
        family: Family,
        figures: Sequence[DegreeFigures],
        setting: PiperSetting,
        replicas: Sequence[int],
        clock: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(family, figures, setting, replicas, clock)
        self.width: int | None = None
        dense = len(family) ** 2 * len(figures) <= _DENSE
        self._pairs = (PairTable if dense else FreshPairs)(self)
        self._tight: tuple[float, Labels] | None = None
        self._loose: tuple[float, Labels] | None = None

    def least_bound(self) -> float:
        """No pipeline has a load below this."""
        return self.rests.least_bound()

    def pipeline(self, bound: float) -> list[Cut] | None:
        """Stages, first to last, with no load above `bound` (finite); None where there are none."""
        tight = self._tight[1] if self._tight and self._tight[0] <= bound else None
        loose = self._loose[1] if self._loose and self._loose[0] >= bound else None
        self.start(bound, loose)
        labels = self.labels
        zero = np.zeros(1, np.int64)
        nothing = np.zeros((1, 2), np.int64)
        labels.add([zero, zero, zero, zero, nothing, nothing])
        if self.rest[0] <= self.setting.devices:
            self._walk(tight, loose)
        found = labels.of(np.array([len(self.family) - 1]))
        if self.width is not None:
            return self._cuts(int(found[0])) if len(found) else None
        if not len(found):
            if self._tight is None or bound > self._tight[0]:
                self._tight = (bound, labels)
            return None
        if self._loose is None or bound < self._loose[0]:
            self._loose = (bound, labels)
        return self._cuts(int(found[0]))

    def forbid(self, cut: Cut) -> None:
        """Makes known that a stage fits in no way (where bounds said so by a rounding error)."""
        self.forbidden.add((cut.low, cut.high, cut.degree, cut.flights))
        self._tight = self._loose = None

    def _cuts(self, at: int) -> list[Cut]:
        found: list[Cut] = []
        after = 0
        for low, high, replicas, degree in reversed(self.labels.chain(at)):
            found.append(Cut(low, high, replicas, degree, 1 + -(-after // replicas)))
            after += replicas
        return found[::-1]

    def _walk(self, tight: Labels | None, loose: Labels | None) -> None:
        """Labels all downsets, largest first.

        Args:
            tight: Labels under a tighter bound, if there are any.
            loose: Labels under a looser bound, if there are any.
        """
        known = np.zeros(len(self.family), bool)
        if tight is not None and loose is not None:
            known = same_front(tight, loose)
        self._pairs.prepare()
        wanted = self.rest < self.setting.devices
        if loose is not None:
            wanted &= loose.number > 0
        wanted[0] = False
        waiting: list[Index] = []  # downsets whose fronts are known
        for level in self.family.levels[1:]:
            self.clock()
            rows = level.start + np.flatnonzero(wanted[level.start : level.stop])
            if not len(rows):
                continue
            if known[rows].all():
                waiting.append(rows)
                continue
            if waiting:
                assert tight is not None
                self.labels.add(tight.columns(tight.of(np.concatenate(waiting))))
                waiting = []
            self._level(rows, rows[~known[rows]], tight)
        if waiting:
            assert tight is not None
            self.labels.add(tight.columns(tight.of(np.concatenate(waiting))))

    def _level(self, rows: Index, unknown: Index, tight: Labels | None) -> None:
        """Adds the labels of downsets of one size."""
        columns = [] if tight is None else [tight.columns(tight.of(rows))]
        if columns:
            self.fronts.note(*columns[0][:3])
        pending = self._pairs.in_front_of(unknown)
        if pending is not None:
            columns += self.settle(pending, len(unknown))
        if columns:
            self._add([np.concatenate(parts) for parts in zip(*columns, strict=True)])

    def _add(self, columns: list[Index]) -> None:
        """Adds the labels of a level that no other beats."""
        down, replicas, devices = columns[:3]
        order = np.lexsort((replicas, devices, down))
        if len(self.degrees) == 1:
            heads = np.ones(len(order), bool)
            heads[1:] = down[order[1:]] != down[order[:-1]]
            kept = order[heads]
        else:
            chosen: list[int] = []
            row, least = -1, 0
            listed = zip(
                order.tolist(), down[order].tolist(), replicas[order].tolist(), strict=True
            )
            for i, here, total in listed:
                if here != row or total < least:
                    row, least = here, total
                    chosen.append(i)
            kept = np.array(chosen, dtype=np.int64)
            if self.width is not None:
                kept = self._spread(kept, down[kept], self.width)
        if len(kept):
            self.labels.add([column[kept] for column in columns])

    @staticmethod
    def _spread(kept: Index, down: Index, width: int) -> Index:
        """Of every downset's labels both ends and some between."""
        found = []
        for one in dict.fromkeys(down.tolist()):
            own = kept[down == one]
            at = np.linspace(0, len(own) - 1, min(width, len(own)))
            found.append(own[at.round().astype(np.int64)])
        return np.concatenate(found)
