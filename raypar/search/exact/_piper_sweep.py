"""Is there a pipeline with no load above a bound? Dynamic programming over downsets.

Walking from the last stage to the first, what earlier stages feel of the later ones is the sum of
their replicas (through the microbatches in flight) and the devices they use. For a given stage,
tensor-parallel degree and sum, the fewest replicas that keep the bound are best in both, so that
every downset has a short list of labels (sum of replicas, devices) none of which beats another.
With one degree there is one label: both figures are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from raypar.search.exact._piper_figures import Array, DegreeFigures, Index
from raypar.search.exact._piper_formula import Setting
from raypar.search.exact._piper_knapsack import bounds, solve
from raypar.search.exact._piper_lattice import Family

_DENSE = 1_500_000
"""Up to so many (pair of downsets, degree), figures of all pairs are kept."""
_CACHED = 120_000
"""Up to so many, the bounds of their knapsacks too."""
_FIRST = 48
"""Stages that are looked at closely at a time."""
_BLOCK = 3_000_000
"""Pairs that are looked at at a time."""


@dataclass(frozen=True)
class Cut:
    """A stage of a pipeline as the search sees it.

    Attributes:
        low: The downset before it.
        high: The downset with it.
        replicas: d.
        degree: Number of its tensor-parallel degree.
        after: Replicas of the stages behind it.
    """

    low: int
    high: int
    replicas: int
    degree: int
    after: int

    @property
    def flights(self) -> int:
        """Microbatches in flight."""
        return 1 + -(-self.after // self.replicas)


@dataclass
class _Pending:
    """Stages whose replicas are not settled yet, as parallel arrays."""

    low: Index
    label: Index
    degree: Index
    number: Index  # of the replicas in the list of allowed ones
    divided: Array
    whole: Array
    easy: Array

    def take(self, which: npt.NDArray[np.bool_] | Index) -> _Pending:
        """Some of them."""
        return _Pending(*(getattr(self, f.name)[which] for f in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[_Pending]) -> _Pending:
        """All of several."""
        names = [f.name for f in fields(cls)]
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


@dataclass
class _Labels:
    """What is known of downsets that a pipeline's later stages reach, as growing arrays."""

    down: Index = field(default_factory=lambda: np.zeros(64, np.int64))
    replicas: Index = field(default_factory=lambda: np.zeros(64, np.int64))
    devices: Index = field(default_factory=lambda: np.zeros(64, np.int64))
    parent: Index = field(default_factory=lambda: np.zeros(64, np.int64))
    last: Index = field(default_factory=lambda: np.zeros((64, 2), np.int64))  # replicas, degree
    count: int = 0

    def add(self, down: Index, replicas: Index, devices: Index, parent: Index, last: Index) -> None:
        """Appends labels."""
        end = self.count + len(down)
        while end > len(self.down):
            for name in ("down", "replicas", "devices", "parent", "last"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        at = slice(self.count, end)
        self.down[at], self.replicas[at], self.devices[at] = down, replicas, devices
        self.parent[at], self.last[at] = parent, last
        self.count = end


class PiperSweep:
    """Finds pipelines under a bound on the load, for one workload, family and setting.

    Args:
        family: The downsets between which stages lie.
        figures: Per tensor-parallel degree, ascending.
        setting: The machine.
        replicas: The numbers of replicas that a stage may have, ascending.
        clock: Called between levels; may raise to end a search.
    """

    def __init__(
        self,
        family: Family,
        figures: Sequence[DegreeFigures],
        setting: Setting,
        replicas: Sequence[int],
        clock: Callable[[], None] = lambda: None,
    ) -> None:
        self.family, self.figures, self.setting = family, figures, setting
        self.replicas = np.array(replicas, dtype=np.int64)
        self.clock = clock
        largest = int(self.replicas[-1])
        self._at_least = np.searchsorted(self.replicas, np.arange(largest + 2))
        self.degrees = np.array([f.degree for f in figures], dtype=np.int64)
        self.least_work = self._least_work()
        self._exactly: dict[tuple[int, int, int, int, int], float] = {}
        n = len(family)
        self._dense = self._all_pairs() if n * n * len(figures) <= _DENSE else None
        self._caching = self._dense is not None and n * n * len(figures) <= _CACHED
        self._cache: dict[int, tuple[Array, Array]] = {}
        self._forbidden: set[tuple[int, int, int, int]] = set()

    def _least_work(self) -> Array:
        """Per downset the device-seconds that its layers take at least."""
        per_layer = [
            min(
                (f.degree * v.seconds for f in self.figures for v in f.variants[at]),
                default=math.inf,
            )
            for at in range(self.family.members.shape[1])
        ]
        return self.family.members @ np.array(per_layer)

    def _all_pairs(self) -> tuple[Array, Array, Array, Array]:
        """(divided, whole, most flights, easy flights), each ``[degree, low, high]``."""
        n = len(self.family)
        every = np.arange(n)
        members = self.family.members.astype(np.float64)
        inside = (members @ (1.0 - members).T) == 0
        np.fill_diagonal(inside, False)
        found = []
        for figures in self.figures:
            weighted = members[:, figures.source] * (figures.into + figures.out)
            skipped = weighted @ (1.0 - members[:, figures.target]).T
            stages = figures.stages(every[:, None], every[None, :], skipped)
            divided = np.where(inside & (stages.most_flights >= 1), stages.divided, np.inf)
            found.append((divided, stages.whole, stages.most_flights, stages.easy_flights))
        return tuple(np.stack(parts) for parts in zip(*found, strict=True))  # type: ignore[return-value]

    def pipeline(self, bound: float) -> list[Cut] | None:
        """Stages, first to last, with no load above `bound`; None where there are none."""
        self._bound = bound * (1 + 1e-13)
        rest = self.least_work / bound
        self._rest = np.ceil(np.minimum(rest, 2.0**40) * (1 - 1e-9)).astype(np.int64)
        k = self.setting.devices
        if self._rest[0] > k:
            return None
        labels = self._labels = _Labels()
        zero = np.zeros(1, dtype=np.int64)
        labels.add(zero, zero, zero, zero - 1, np.zeros((1, 2), np.int64))
        n = len(self.family)
        self._lean = np.full(n, (k + 1) << 32, dtype=np.int64)  # (devices, replicas), least first
        self._few = np.full(n, (k + 1) << 32, dtype=np.int64)  # (replicas, devices), least first
        starts = self._starts() if self._dense is not None else None
        for level in self.family.levels[1:]:
            self.clock()
            alive = np.array(level)[self._rest[level.start : level.stop] < k]
            if not len(alive):
                continue
            pending = self._from_table(alive, starts) if starts is not None else self._fresh(alive)
            if pending is not None:
                self._settle(pending)
        ends = np.flatnonzero(labels.down[: labels.count] == n - 1)
        return None if not len(ends) else self._unroll(int(ends[0]))

    def _unroll(self, at: int) -> list[Cut]:
        labels, found = self._labels, []
        while labels.parent[at] >= 0:
            parent = int(labels.parent[at])
            d, t = (int(v) for v in labels.last[at])
            found.append(
                Cut(
                    int(labels.down[at]),
                    int(labels.down[parent]),
                    d,
                    t,
                    int(labels.replicas[parent]),
                )
            )
            at = parent
        return found

    def _number(self, divided: Array, whole: Array) -> Index:
        """Number of the fewest replicas that the bound allows without recomputation."""
        room = self._bound - whole
        limit = float(self.replicas[-1]) + 1
        with np.errstate(invalid="ignore"):
            wanted = np.divide(divided, room, out=np.full_like(divided, limit), where=room > 0)
        wanted = np.clip(np.ceil(wanted * (1 - 1e-13)), 0, limit).astype(np.int64)
        number = self._at_least[wanted]
        # Where gradient sums alone exceed the bound, only few replicas can keep it.
        first = int(self.replicas[0])
        few = (room <= 0) & (divided / first + whole <= self._bound)
        return np.where(few, 0, number)

    def _starts(self) -> Index:
        assert self._dense is not None
        return self._number(self._dense[0], self._dense[1])

    def _from_table(self, rows: Index, starts: Index) -> _Pending | None:
        assert self._dense is not None
        labels, count = self._labels, self._labels.count
        high = labels.down[:count]
        number = starts[:, rows[:, None], high[None, :]]
        degree, row, label = np.nonzero(number < len(self.replicas))
        if not len(degree):
            return None
        low = rows[row]
        numbers = number[degree, row, label]
        fits = (
            labels.devices[label] + self.replicas[numbers] * self.degrees[degree] + self._rest[low]
        ) <= self.setting.devices
        degree, low, label, numbers = degree[fits], low[fits], label[fits], numbers[fits]
        at = (degree, low, labels.down[label])
        divided, whole, most, easy = (table[at] for table in self._dense)
        return self._ready(low, label, degree, numbers, divided, whole, most, easy)

    def _fresh(self, rows: Index) -> _Pending | None:
        """As `_from_table`, with figures worked out for what the devices allow."""
        labels, count, k = self._labels, self._labels.count, self.setting.devices
        found: list[_Pending] = []
        high = labels.down[:count]
        # A stage uses no fewer devices than its least work over the bound.
        key = self.least_work[high] + self._bound * labels.devices[:count]
        order = np.argsort(key, kind="stable")
        limit = self._bound * (k - self._rest[rows]) + self.least_work[rows]
        ends = np.searchsorted(key[order], limit * (1 + 1e-12), "right")
        step = max(1, _BLOCK // max(int(ends.max(initial=0)), 1))
        for at in range(0, len(rows), step):
            part, end = rows[at : at + step], ends[at : at + step]
            width = int(end.max(initial=0))
            near = order[:width]
            nested = np.arange(width)[None, :] < end[:, None]
            for word in self.family.words.T:
                nested &= (word[part][:, None] & ~word[high[near]][None, :]) == 0
            row, column = np.nonzero(nested)
            if len(row):
                found += self._degrees(part[row], near[column])
        if not found:
            return None
        return _Pending.joined(found)

    def _degrees(self, low: Index, label: Index) -> list[_Pending]:
        labels, found = self._labels, []
        for at, figures in enumerate(self.figures):
            high = labels.down[label]
            rough = figures.seconds[high] - figures.seconds[low]
            rough -= self.setting.sync * (figures.parameters[high] - figures.parameters[low])
            whole = self.setting.sync * (figures.parameters[high] - figures.parameters[low])
            number = self._number(rough, whole)
            keep = self._fits(low, label, number, np.full(len(low), at))
            low_, label_ = low[keep], label[keep]
            stages = figures.stages(low_, labels.down[label_])
            number = self._number(stages.divided, stages.whole)
            degree = np.full(len(low_), at)
            keep = self._fits(low_, label_, number, degree)
            keep &= (stages.most_flights >= 1) & (stages.divided < np.inf)
            ready = self._ready(
                low_[keep],
                label_[keep],
                degree[keep],
                number[keep],
                stages.divided[keep],
                stages.whole[keep],
                stages.most_flights[keep],
                stages.easy_flights[keep],
            )
            if ready is not None:
                found.append(ready)
        return found

    def _fits(
        self, low: Index, label: Index, number: Index, degree: Index
    ) -> npt.NDArray[np.bool_]:
        """Whether devices and microbatches suffice, and no label of the downset is better."""
        inside = number < len(self.replicas)
        d = self.replicas[np.minimum(number, len(self.replicas) - 1)]
        total = self._labels.replicas[label] + d
        devices = self._labels.devices[label] + d * self.degrees[degree]
        inside &= devices + self._rest[low] <= self.setting.devices
        inside &= total <= self.setting.microbatches
        for best, first, second in ((self._lean, devices, total), (self._few, total, devices)):
            known = best[low]
            inside &= (first < known >> 32) | (second < (known & 0xFFFFFFFF))
        return inside

    def _ready(
        self,
        low: Index,
        label: Index,
        degree: Index,
        number: Index,
        divided: Array,
        whole: Array,
        most: Array,
        easy: Array,
    ) -> _Pending | None:
        """Raises replicas to where the leanest variants fit."""
        after = self._labels.replicas[label]
        wanted = np.divide(after, most - 1, out=np.where(after > 0, np.inf, 0.0), where=most > 1)
        limit = len(self._at_least) - 1
        lifted = self._at_least[np.minimum(np.ceil(wanted), limit).astype(np.int64)]
        pending = _Pending(low, label, degree, np.maximum(number, lifted), divided, whole, easy)
        keep = self._fits(low, label, pending.number, degree)
        return pending.take(keep) if keep.any() else None

    def _settle(self, pending: _Pending) -> None:
        """Finds the fewest replicas of every stage that can matter, and adds the labels."""
        done: list[_Pending] = []
        labels = self._labels
        while len(pending.low):
            d = self.replicas[pending.number]
            total = labels.replicas[pending.label] + d
            devices = labels.devices[pending.label] + d * self.degrees[pending.degree]
            if len(pending.low) > _FIRST:
                order = np.lexsort((total, devices))
                rank = order[:_FIRST]
                first = np.zeros(len(pending.low), dtype=bool)
                first[rank] = True
            else:
                first = np.ones(len(pending.low), dtype=bool)
            looked = pending.take(first)
            good = self._keeps_bound(looked)
            settled = looked.take(good)
            if len(settled.low):
                done.append(settled)
                t, k = total[first][good], devices[first][good]
                np.minimum.at(self._lean, settled.low, (k << 32) | t)
                np.minimum.at(self._few, settled.low, (t << 32) | k)
            failed = looked.take(~good)
            failed.number = failed.number + 1
            pending = _Pending.joined([failed, pending.take(~first)])
            pending = pending.take(
                self._fits(pending.low, pending.label, pending.number, pending.degree)
            )
        if done:
            self._add(done)

    def _keeps_bound(self, pending: _Pending) -> npt.NDArray[np.bool_]:
        """Whether every stage keeps the bound with its replicas, recomputing where it must."""
        d = self.replicas[pending.number]
        flights = 1 - (-self._labels.replicas[pending.label] // d)
        good = pending.divided / d + pending.whole <= self._bound
        if self._forbidden:
            stages = (pending.low, self._labels.down[pending.label], pending.degree, flights)
            good &= [stage not in self._forbidden for stage in zip(*stages, strict=True)]
        hard = np.flatnonzero(good & (flights > pending.easy))
        for number, figures in enumerate(self.figures):
            if not figures.exact:  # every one of its stages is a knapsack of its own
                hard = np.union1d(hard, np.flatnonzero(good & (pending.degree == number)))
        if not len(hard):
            return good
        low, high = pending.low[hard], self._labels.down[pending.label[hard]]
        degree, y = pending.degree[hard], flights[hard]
        least, enough = self._recompute(low, high, degree, y)
        d, divided, whole = d[hard], pending.divided[hard], pending.whole[hard]
        fails = (divided + least) / d + whole > self._bound
        sure = (divided + enough) / d + whole <= self._bound
        for i in np.flatnonzero(~fails & ~sure):
            cut = Cut(int(low[i]), int(high[i]), int(d[i]), int(degree[i]), 0)
            extra = self._exact(cut, int(y[i]), float(divided[i]), float(whole[i]))
            sure[i] = (divided[i] + extra) / d[i] + whole[i] <= self._bound
        good[hard] = sure
        return good

    def _recompute(
        self, low: Index, high: Index, degree: Index, flights: Index
    ) -> tuple[Array, Array]:
        """Bounds of the seconds that recomputation adds; infinite where nothing fits."""
        least, enough = np.full(len(low), np.inf), np.full(len(low), np.inf)
        code = flights * len(self.figures) + degree
        n = len(self.family)
        for one in np.unique(code):
            which = np.flatnonzero(code == one)
            y, t = divmod(int(one), len(self.figures))
            pair = low[which] * n + high[which]
            if self._caching:
                if int(one) not in self._cache:
                    self._cache[int(one)] = (np.full(n * n, np.nan), np.full(n * n, np.nan))
                kept_low, kept_high = self._cache[int(one)]
                new = np.unique(pair[np.isnan(kept_low[pair])])
                if len(new):
                    kept_low[new], kept_high[new] = self._bounds(new // n, new % n, t, y)
                least[which], enough[which] = kept_low[pair], kept_high[pair]
            else:
                least[which], enough[which] = self._bounds(low[which], high[which], t, y)
        return least, enough

    def _bounds(self, low: Index, high: Index, degree: int, flights: int) -> tuple[Array, Array]:
        figures = self.figures[degree]
        fast, lean = figures.bytes_of(flights)
        memory = self.setting.memory
        need = fast[high] - fast[low] - memory
        impossible = lean[high] - lean[low] > memory * (1 + 1e-12)
        least = np.where(impossible, np.inf, 0.0)
        enough = least.copy()
        which = np.flatnonzero((need > 0) & ~impossible)
        steps = figures.steps(flights)
        if len(which) and len(steps.layer):
            inside = self.family.members[high[which]] & ~self.family.members[low[which]]
            least[which], enough[which] = bounds(steps, inside, need[which])
        if not figures.exact:
            enough[:] = np.inf
        return least, enough

    def _exact(self, cut: Cut, flights: int, divided: float, whole: float) -> float:
        """Seconds that recomputation adds to `divided`, exactly."""
        figures = self.figures[cut.degree]
        replicas = 0 if figures.exact else cut.replicas
        key = (cut.low, cut.high, cut.degree, flights, replicas)
        if key not in self._exactly:
            found = self.choose(cut, flights)
            extra = math.inf
            if found is not None:
                extra = (figures.load(*found, cut.replicas) - whole) * cut.replicas - divided
            self._exactly[key] = extra
            if self._caching and figures.exact:
                kept = self._cache[flights * len(self.figures) + cut.degree]
                for table in kept:
                    table[cut.low * len(self.family) + cut.high] = extra
        return self._exactly[key]

    def forbid(self, cut: Cut) -> None:
        """Makes known that a stage fits in no way (where a bound said so by a rounding error)."""
        self._forbidden.add((cut.low, cut.high, cut.degree, cut.flights))

    def choose(self, cut: Cut, flights: int) -> tuple[list[int], list[int]] | None:
        """(positions of the stage's layers, the best variant of each); None where nothing fits."""
        positions = self.family.between(cut.low, cut.high)
        choices = self.figures[cut.degree].weighed(positions, cut.replicas, flights)
        picks = solve(choices, self.setting.memory)
        return None if picks is None else (positions, picks)

    def _add(self, done: Sequence[_Pending]) -> None:
        """Keeps of every downset's labels those that no other beats."""
        labels, found = self._labels, _Pending.joined(done)
        d = self.replicas[found.number]
        total = labels.replicas[found.label] + d
        devices = labels.devices[found.label] + d * self.degrees[found.degree]
        order = np.lexsort((total, devices, found.low))
        kept: list[int] = []
        low, least = -1, 0
        for i in order.tolist():
            if found.low[i] != low:
                low, least = int(found.low[i]), int(total[i]) + 1
            if total[i] < least:
                least = int(total[i])
                kept.append(i)
        at = np.array(kept)
        labels.add(
            found.low[at],
            total[at],
            devices[at],
            found.label[at],
            np.stack([d[at], found.degree[at]], axis=1),
        )
