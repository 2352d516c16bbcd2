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

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_formula import PiperSetting
from raypar.search.exact._piper_labels import (
    Array,
    Fronts,
    Index,
    Labels,
    Mask,
    Pending,
    same_front,
)
from raypar.search.exact._piper_lattice import Family
from raypar.search.exact._piper_pairs import FreshPairs, PairTable
from raypar.search.exact._piper_recompute import Recompute
from raypar.search.exact._piper_rest import Rest

_DENSE = 1_500_000
"""Up to so many (pair of downsets, degree), figures of all pairs are kept."""
_CLOSELY = 24
"""Stages in front of a downset that are looked at closely at a time."""


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


class PiperSweep:
    """Finds pipelines under a bound on the load, for one workload, family and setting.

    Args:
        family: The downsets between which stages lie.
        figures: Per tensor-parallel degree, ascending.
        setting: The machine.
        replicas: The numbers of replicas that a stage may have, ascending.
        clock: Called between levels; may raise to end a search.

    Attributes:
        width: Labels that a downset keeps at most; None: all. With fewer, what is found is a
            pipeline, but where none is found there may be one.
        least_work: Per downset the device-seconds that its layers take at least.
        least_seconds: Per downset the seconds that one replica takes for its layers at least.
        bound: The bound that is being tried, with room for rounding.
        rest: Per downset the devices that its layers take at least under that bound.
        labels: What is known under it.
    """

    def __init__(
        self,
        family: Family,
        figures: Sequence[DegreeFigures],
        setting: PiperSetting,
        replicas: Sequence[int],
        clock: Callable[[], None] = lambda: None,
    ) -> None:
        self.width: int | None = None
        self.family, self.figures, self.setting = family, figures, setting
        self.replicas = np.array(replicas, dtype=np.int64)
        self.clock = clock
        self._at_least = np.searchsorted(self.replicas, np.arange(int(self.replicas[-1]) + 2))
        self.degrees = np.array([f.degree for f in figures], dtype=np.int64)
        self.least_work = self._least_work(of_devices=True)
        self.least_seconds = self._least_work(of_devices=False)
        self.recompute = Recompute(family, figures, setting.memory)
        self._closely = _CLOSELY if len(figures) == 1 else 8 * _CLOSELY
        self._rests = Rest(family, figures, setting)
        dense = len(family) ** 2 * len(figures) <= _DENSE
        self._pairs = (PairTable if dense else FreshPairs)(self)
        self._forbidden: set[tuple[int, int, int, int]] = set()
        self._tight: tuple[float, Labels] | None = None
        self._loose: tuple[float, Labels] | None = None

    def _least_work(self, *, of_devices: bool) -> Array:
        per_layer = [
            min(
                (
                    (f.degree if of_devices else 1) * v.seconds
                    for f in self.figures
                    for v in f.variants[at]
                ),
                default=math.inf,
            )
            for at in range(self.family.members.shape[1])
        ]
        return self.family.members @ np.array(per_layer)

    def least_bound(self) -> float:
        """No pipeline has a load below this."""
        return self._rests.least_bound()

    def pipeline(self, bound: float) -> list[Cut] | None:
        """Stages, first to last, with no load above `bound` (finite); None where there are none."""
        self.bound = bound * (1 + 1e-13)
        self._rests.update(self.bound)
        self.rest = self._rests.table[:, 0]
        labels = self.labels = Labels(len(self.family))
        zero = np.zeros(1, np.int64)
        nothing = np.zeros((1, 2), np.int64)
        labels.add([zero, zero, zero, zero, nothing, nothing])
        if self.rest[0] <= self.setting.devices:
            self._walk(bound)
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
        self._forbidden.add((cut.low, cut.high, cut.degree, cut.flights))
        self._tight = self._loose = None

    def _cuts(self, at: int) -> list[Cut]:
        found: list[Cut] = []
        after = 0
        for low, high, replicas, degree in reversed(self.labels.chain(at)):
            found.append(Cut(low, high, replicas, degree, 1 + -(-after // replicas)))
            after += replicas
        return found[::-1]

    def _walk(self, bound: float) -> None:
        n = len(self.family)
        self.pairs = self._pairs
        self.fronts = Fronts(n, self.setting.devices)
        tight = self._tight[1] if self._tight and self._tight[0] <= bound else None
        loose = self._loose[1] if self._loose and self._loose[0] >= bound else None
        known = np.zeros(n, bool)
        self._limits = Fronts(n, -1)
        self._limited = np.zeros(n, bool)
        if loose is not None:
            if tight is not None:
                known = same_front(tight, loose)
            part = slice(0, loose.count)
            self._limits.note(loose.down[part], loose.replicas[part], loose.devices[part])
            self._limited = (loose.number > 0) & (loose.number <= 2)
        self._limited_at_all = loose is not None
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
        pending = self.pairs.in_front_of(unknown)
        if pending is not None:
            columns += self._settle(pending, self._closely * len(unknown))
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

    def number(self, divided: Array, whole: Array) -> Index:
        """Number of the fewest replicas that the bound allows without recomputation."""
        room = self.bound - whole
        limit = float(self.replicas[-1]) + 1
        with np.errstate(invalid="ignore"):
            wanted = np.divide(divided, room, out=np.full_like(divided, limit), where=room > 0)
        wanted = np.clip(np.ceil(wanted * (1 - 1e-13)), 0, limit).astype(np.int64)
        # Where gradient sums alone exceed the bound, only few replicas can keep it.
        few = (room <= 0) & (divided / int(self.replicas[0]) + whole <= self.bound)
        found: Index = np.where(few, 0, self._at_least[wanted])
        return found

    def fits(self, low: Index, label: Index, degree: Index, number: Index) -> Mask:
        """Whether devices and microbatches suffice, and no known label is as good."""
        inside = number < len(self.replicas)
        d = self.replicas[np.minimum(number, len(self.replicas) - 1)]
        total = self.labels.replicas[label] + d
        devices = self.labels.devices[label] + d * self.degrees[degree]
        k = self.setting.devices
        rest = np.maximum(self.rest[low], self._rests.of(low, np.minimum(total, k + 1)))
        inside &= devices + rest <= k
        inside &= total <= self.setting.microbatches
        inside &= self.fronts.improved(low, total, devices)
        return inside

    def lifted(self, after: Index, most: Array) -> Index:
        """Number of the fewest replicas with no more than `most` flights.

        Args:
            after: Replicas of the stages behind.
            most: Most flights.
        """
        never = np.where((after > 0) | (most < 1), np.inf, 0.0)
        wanted = np.divide(after, most - 1, out=never, where=most > 1)
        limit = len(self._at_least) - 1
        found: Index = self._at_least[np.minimum(np.ceil(wanted), limit).astype(np.int64)]
        return found

    def replicas_behind(self) -> Index:
        """Per downset no more than the replicas of the stages outside it."""
        work = (self.least_seconds[0] - self.least_seconds) / self.bound
        least = np.ceil(np.minimum(work, 2.0**40) * (1 - 1e-9)).astype(np.int64)
        if self._limited_at_all:
            least = np.maximum(least, self._limits.few >> 32)
        return least

    def ready(self, pending: Pending, most: Array) -> Pending:
        """Raises replicas to where the leanest variants fit; leaves out what cannot matter.

        Args:
            pending: The stages.
            most: Most flights with which their leanest variants may fit.
        """
        after = self.labels.replicas[pending.label]
        limit = len(self._at_least) - 1  # more replicas than are allowed
        pending.number = np.maximum(pending.number, self.lifted(after, most))
        if self._limited_at_all:
            # A looser bound needs so many replicas and devices already.
            few = (self._limits.few[pending.low] >> 32) - after
            lean = (self._limits.lean[pending.low] >> 32) - self.labels.devices[pending.label]
            lean = -(-lean // self.degrees[pending.degree])
            needed = np.clip(np.maximum(few, lean), 0, limit)
            pending.number = np.maximum(pending.number, self._at_least[needed])
        keep = self.fits(pending.low, pending.label, pending.degree, pending.number)
        return pending.take(keep & (most >= 1))

    def _settle(self, pending: Pending, closely: int) -> list[list[Index]]:
        """The fewest replicas of every stage that can matter, as columns of labels.

        Args:
            pending: The stages.
            closely: How many are looked at closely at a time.
        """
        found: list[list[Index]] = []
        labels = self.labels
        pending = self._with_more_replicas(pending)
        while len(pending.low):
            d = self.replicas[pending.number]
            total = labels.replicas[pending.label] + d
            devices = labels.devices[pending.label] + d * self.degrees[pending.degree]
            looked, pending_after = pending, None
            if len(d) > closely:
                order = np.argpartition((devices << 32) | total, closely)
                first = order[:closely]
                looked, pending_after = pending.take(first), pending.take(order[closely:])
                d, total, devices = d[first], total[first], devices[first]
            good = np.flatnonzero(self._keeps_bound(looked))
            if len(good):
                low, label = looked.low[good], looked.label[good]
                stage = np.stack([d[good], looked.degree[good]], axis=1)
                after = np.stack([labels.replicas[label], labels.devices[label]], axis=1)
                total, devices = total[good], devices[good]
                found.append([low, total, devices, labels.down[label], stage, after])
                self.fronts.note(low, total, devices)
            if pending_after is None:
                break
            pending = self._hopeful(pending_after)
        return found

    def _with_more_replicas(self, pending: Pending) -> Pending:
        """Every stage with its replicas and with any more that are allowed, as stages apart."""
        left = self.setting.devices - self.labels.devices[pending.label] - self.rest[pending.low]
        largest = np.minimum(left // self.degrees[pending.degree], int(self.replicas[-1]))
        end = self._at_least[largest + 1]
        # With so many replicas a stage needs no recomputation, and no more of them can help.
        easy = self.lifted(self.labels.replicas[pending.label], pending.easy)
        end = np.minimum(end, np.maximum(pending.number, easy) + 1)
        if self._forbidden or not all(f.exact for f in self.figures):
            end = self._at_least[largest + 1]
        more = np.maximum(end - pending.number, 0)
        skip = np.repeat(np.cumsum(more) - more, more)
        expanded = pending.take(np.repeat(np.arange(len(more)), more))
        expanded.number = expanded.number + np.arange(len(skip)) - skip
        return self._hopeful(expanded)

    def _hopeful(self, pending: Pending) -> Pending:
        keep = self.fits(pending.low, pending.label, pending.degree, pending.number)
        return pending.take(keep & ~self._reached(pending.low))

    def _reached(self, low: Index) -> Mask:
        """Whether the front is that of a looser bound, so that nothing can be better."""
        fronts, limits = self.fronts, self._limits
        same = (fronts.lean[low] <= limits.lean[low]) & (fronts.few[low] <= limits.few[low])
        same &= self._limited[low]
        return same

    def _keeps_bound(self, pending: Pending) -> Mask:
        """Whether every stage keeps the bound with its replicas, recomputing where it must."""
        d = self.replicas[pending.number]
        flights = 1 - (-self.labels.replicas[pending.label] // d)
        good: Mask = pending.divided / d + pending.whole <= self.bound
        if self._forbidden:
            stages = (pending.low, self.labels.down[pending.label], pending.degree, flights)
            good &= [stage not in self._forbidden for stage in zip(*stages, strict=True)]
        hard = good & (flights > pending.easy)
        for number, figures in enumerate(self.figures):
            if not figures.exact:  # every one of its stages is a knapsack of its own
                hard |= good & (pending.degree == number)
        which = np.flatnonzero(hard)
        if not len(which):
            return good
        low, high = pending.low[which], self.labels.down[pending.label[which]]
        degree, y = pending.degree[which], flights[which]
        least, enough = self.recompute.bounds(low, high, degree, y)
        d, divided, whole = d[which], pending.divided[which], pending.whole[which]
        sure = (divided + enough) / d + whole <= self.bound
        open_ = ~sure & ((divided + least) / d + whole <= self.bound)
        for i in np.flatnonzero(open_).tolist():
            stage = (int(low[i]), int(high[i]), int(d[i]), int(degree[i]), int(y[i]))
            extra = self.recompute.exactly(*stage, (float(divided[i]), float(whole[i])))
            sure[i] = (divided[i] + extra) / d[i] + whole[i] <= self.bound
        good[which] = sure
        return good
