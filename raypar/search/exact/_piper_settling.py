"""Which stages keep a bound on the load, and with how many replicas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_formula import PiperSetting
from raypar.search.exact._piper_labels import Array, Fronts, Index, Labels, Mask, Pending
from raypar.search.exact._piper_lattice import Family
from raypar.search.exact._piper_recompute import Recompute
from raypar.search.exact._piper_rest import Rest

_CLOSELY = 24
"""Stages in front of a downset that are looked at closely at a time."""


class Settling:
    """What a sweep over downsets knows while it tries a bound, and the stages under it.

    Args:
        family: The downsets between which stages lie.
        figures: Per tensor-parallel degree, ascending.
        setting: The machine.
        replicas: The numbers of replicas that a stage may have, ascending.
        clock: Called every now and then; may raise to end a search.

    Attributes:
        bound: The bound that is being tried, with room for rounding.
        rests: Devices that downsets take at least under that bound.
        rest: Those, whatever stages lie behind.
        labels: What is known under it.
        fronts: The best labels of every downset so far.
        limits: The best labels under a looser bound, which none gets below; None if none is known.
        forbidden: Stages (low, high, number of degree, flights) that fit in no way after all.
    """

    def __init__(
        self,
        family: Family,
        figures: Sequence[DegreeFigures],
        setting: PiperSetting,
        replicas: Sequence[int],
        clock: Callable[[], None],
    ) -> None:
        self.family, self.figures, self.setting = family, figures, setting
        self.replicas = np.array(replicas, dtype=np.int64)
        self.clock = clock
        self.degrees = np.array([f.degree for f in figures], dtype=np.int64)
        self.recompute = Recompute(family, figures, setting.memory)
        self.rests = Rest(family, figures, setting)
        self.least_work = self._least_work(of_devices=True)
        self.least_seconds = self._least_work(of_devices=False)
        self.forbidden: set[tuple[int, int, int, int]] = set()
        self._at_least = np.searchsorted(self.replicas, np.arange(int(self.replicas[-1]) + 2))
        self.start(math.inf, None)

    def start(self, bound: float, loose: Labels | None) -> None:
        """Begins with another bound.

        Args:
            bound: The bound.
            loose: Labels under a looser one, if there are any.
        """
        n, k = len(self.family), self.setting.devices
        self.bound = bound * (1 + 1e-13)
        self.labels = Labels(n)
        self.fronts = Fronts(n, k)
        self.limits = None if loose is None else Fronts(n, k)
        self._limited = np.zeros(n, bool)
        if loose is not None and self.limits is not None:
            part = slice(0, loose.count)
            self.limits.note(loose.down[part], loose.replicas[part], loose.devices[part])
            self._limited = (loose.number > 0) & (loose.number <= 2)
        if bound < math.inf:
            self.rests.update(self.bound)
        self.rest = self.rests.table[:, 0]

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
        rest = np.maximum(self.rest[low], self.rests.of(low, np.minimum(total, k + 1)))
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
        if self.limits is not None:
            least = np.maximum(least, self.limits.few >> 32)
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
        if self.limits is not None:
            # A looser bound needs so many replicas and devices already.
            few = (self.limits.few[pending.low] >> 32) - after
            lean = (self.limits.lean[pending.low] >> 32) - self.labels.devices[pending.label]
            lean = -(-lean // self.degrees[pending.degree])
            needed = np.clip(np.maximum(few, lean), 0, limit)
            pending.number = np.maximum(pending.number, self._at_least[needed])
        keep = self.fits(pending.low, pending.label, pending.degree, pending.number)
        return pending.take(keep & (most >= 1))

    def settle(self, pending: Pending, downsets: int) -> list[list[Index]]:
        """The fewest replicas of every stage that can matter, as columns of labels.

        Args:
            pending: The stages.
            downsets: In front of how many downsets they are.
        """
        closely = _CLOSELY * downsets * (1 if len(self.figures) == 1 else 8)
        found: list[list[Index]] = []
        labels = self.labels
        pending = self._with_more_replicas(pending)
        while len(pending.low):
            self.clock()
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
        if self.forbidden or not all(f.exact for f in self.figures):
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
        fronts, limits = self.fronts, self.limits
        if limits is None:
            return np.zeros(len(low), bool)
        same = (fronts.lean[low] <= limits.lean[low]) & (fronts.few[low] <= limits.few[low])
        same &= self._limited[low]
        return same

    def _keeps_bound(self, pending: Pending) -> Mask:
        """Whether every stage keeps the bound with its replicas, recomputing where it must."""
        d = self.replicas[pending.number]
        flights = 1 - (-self.labels.replicas[pending.label] // d)
        good: Mask = pending.divided / d + pending.whole <= self.bound
        if self.forbidden:
            stages = (pending.low, self.labels.down[pending.label], pending.degree, flights)
            good &= [stage not in self.forbidden for stage in zip(*stages, strict=True)]
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
