"""What stages cost, as differences of figures of the downsets they lie between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raypar.graph.workloads import LayerVariant, LayerWorkload
from raypar.search.exact._piper_formula import Formula, PiperSetting, bytes_in
from raypar.search.exact._piper_knapsack import Choice, Steps, cheapest, steps_of, steps_of_pairs
from raypar.search.exact._piper_lattice import Family

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Stages:
    """Figures of many stages at one tensor-parallel degree.

    Attributes:
        divided: Seconds that d replicas divide among themselves, less what they add:
            edges + compute - `whole`.
        whole: Seconds that remain however many replicas there are: load = divided/d + whole.
        most_flights: Microbatches in flight with which the leanest variants may fit at most.
        easy_flights: Microbatches in flight with which the cheapest variants fit.
    """

    divided: Array
    whole: Array
    most_flights: Array
    easy_flights: Array


_FEWEST_FLIGHTS, _MOST_FLIGHTS = 0, 1 << 30


class DegreeFigures:
    """Figures of all downsets at one tensor-parallel degree.

    Args:
        workload: The layers.
        family: The downsets.
        setting: The machine.
        degree: The tensor-parallel degree.

    Attributes:
        exact: Whether variants of a layer differ only in seconds and memory, so that the relaxation
            is one of the whole cost.
    """

    def __init__(
        self, workload: LayerWorkload, family: Family, setting: PiperSetting, degree: int
    ) -> None:
        self.family = family
        self.setting = setting
        self.degree = degree
        self.formula = Formula(workload, family.order, setting)
        layers = family.order.layers
        self.variants: list[tuple[LayerVariant, ...]] = [
            layer.variants.get(degree, ()) for layer in layers
        ]
        self.exact = all(_alike(variants) for variants in self.variants)
        self._pairs = self._as_pairs()
        members = self._members = family.members.astype(np.float64)
        self.missing = members @ self._per_layer(lambda v: 0.0, 1.0)
        self.seconds = members @ self._per_layer(lambda v: v.seconds)
        self.parameters = members @ self._per_layer(lambda v: v.parameter_bytes)
        easy = [self._easiest(variants) for variants in self.variants]
        self.easy_slope = members @ np.array([e[0] for e in easy])
        self.easy_always = members @ np.array([e[1] for e in easy])
        self.least_slope = members @ self._per_layer(lambda v: v.bytes_per_flight)
        self.least_always = members @ self._per_layer(lambda v: v.bytes_always)
        self._edges(workload, members)

    def _per_layer(self, of: Callable[[LayerVariant], float], missing: float = 0.0) -> Array:
        return np.array([min(map(of, vs)) if vs else missing for vs in self.variants], dtype=float)

    @staticmethod
    def _easiest(variants: tuple[LayerVariant, ...]) -> tuple[float, float]:
        """(bytes per flight, bytes always) that hold for a variant of the least cost."""
        if not variants:
            return 0.0, 0.0
        least = min(v.seconds for v in variants)
        chosen = min(
            (v for v in variants if v.seconds == least),
            key=lambda v: (v.bytes_per_flight, v.bytes_always),
        )
        return chosen.bytes_per_flight, chosen.bytes_always

    def _edges(self, workload: LayerWorkload, members: Array) -> None:
        position = self.family.order.position
        self.source = np.array([position[e.source] for e in workload.edges], dtype=np.intp)
        self.target = np.array([position[e.target] for e in workload.edges], dtype=np.intp)
        into, out = [], []
        for edge in workload.edges:
            reader = self.variants[position[edge.target]]
            maker = self.variants[position[edge.source]]
            into.append(
                edge.nbytes + min((v.sync_forward.get(edge.source, 0.0) for v in reader), default=0)
            )
            out.append(
                edge.nbytes + min((v.sync_backward.get(edge.target, 0.0) for v in maker), default=0)
            )
        per_byte = 2.0 / self.setting.bandwidth
        self.into = np.array(into) * per_byte
        self.out = np.array(out) * per_byte
        cut = members[:, self.source] * (1.0 - members[:, self.target])
        self.cut_into = cut @ self.into
        self.cut_out = cut @ self.out

    def skipped(self, low: Index, high: Index) -> Array:
        """Seconds of edges that begin inside `low` and end outside `high`, pair by pair."""
        both = self.into + self.out
        members = self.family.members
        found = np.zeros(len(low))
        chunk = max(1, 4_000_000 // max(len(both), 1))
        for at in range(0, len(low), chunk):
            a = members[low[at : at + chunk]][:, self.source]
            b = members[high[at : at + chunk]][:, self.target]
            found[at : at + chunk] = (a & (1 - b)) @ both
        return found

    def stages(self, low: Index, high: Index, skipped: Array | None = None) -> Stages:
        """Figures of the stages between nested downsets, pair by pair (or broadcast).

        Args:
            low: The smaller downsets.
            high: The larger ones.
            skipped: What `skipped` gives for them, where it is known.
        """
        skips = self.skipped(low, high) if skipped is None else skipped
        edges = np.maximum(self.cut_into[low] + self.cut_out[high] - skips, 0.0)
        whole = self.setting.sync * np.maximum(self.parameters[high] - self.parameters[low], 0.0)
        seconds = self.seconds[high] - self.seconds[low]
        divided = np.where(self.missing[high] > self.missing[low], np.inf, edges + seconds - whole)
        memory = self.setting.memory
        return Stages(
            divided,
            whole,
            _flights(
                memory,
                self.least_slope[high] - self.least_slope[low],
                self.least_always[high] - self.least_always[low],
                1e-12,
            ),
            _flights(
                memory,
                self.easy_slope[high] - self.easy_slope[low],
                self.easy_always[high] - self.easy_always[low],
                -1e-14,
            ),
        )

    def steps(self, flights: int) -> Steps:
        """Steps to leaner variants with that many microbatches in flight."""
        if self._pairs is None:
            return steps_of([self.choices(v, flights) for v in self.variants])
        seconds, slope, always = self._pairs
        return steps_of_pairs(seconds, slope * flights + always)

    def choices(self, variants: tuple[LayerVariant, ...], flights: int) -> Choice:
        """(seconds, bytes) of a layer's variants."""
        return [(v.seconds, bytes_in(v, flights)) for v in variants]

    def weighed(self, positions: Sequence[int], replicas: int, flights: int) -> list[Choice]:
        """(device-seconds, bytes) of every variant of the layers of one stage."""
        if self.exact:
            return [self.choices(self.variants[p], flights) for p in positions]
        inside = set(positions)
        return [
            [
                (self.formula.share(p, v, inside, replicas), bytes_in(v, flights))
                for v in self.variants[p]
            ]
            for p in positions
        ]

    def load(self, positions: Sequence[int], picks: Sequence[int], replicas: int) -> float:
        """Seconds per microbatch of a stage with chosen variants."""
        chosen = [self.variants[p][j] for p, j in zip(positions, picks, strict=True)]
        return self.formula.load(positions, chosen, replicas)

    def bytes_of(self, flights: int) -> tuple[Array, Array]:
        """Per downset the bytes of its layers' cheapest and of their leanest variants."""
        if self._pairs is not None:
            seconds, slope, always = self._pairs
            nbytes = slope * flights + always
            lean = nbytes.min(axis=1)
            first, second = nbytes.T
            fast = np.where(seconds[:, 0] < seconds[:, 1], first, second)
            fast = np.where(seconds[:, 0] == seconds[:, 1], lean, fast)
        else:
            table = [self.choices(v, flights) for v in self.variants]
            fast = np.array([cheapest(c)[1] if c else 0.0 for c in table])
            lean = np.array([min(m for _, m in c) if c else 0.0 for c in table])
        found = self._members @ np.stack([fast, lean], axis=1)
        return found[:, 0], found[:, 1]

    def _as_pairs(self) -> tuple[Array, Array, Array] | None:
        """(seconds, bytes per flight, bytes always), ``[layer, variant]``.

        None where a layer has more than two variants. One variant is given twice, none is nothing.
        """
        if any(len(variants) > 2 for variants in self.variants):
            return None
        both = [(v[0], v[-1]) if v else () for v in self.variants]
        return (
            np.array([[v.seconds for v in pair] or [0.0, 0.0] for pair in both]),
            np.array([[v.bytes_per_flight for v in pair] or [0.0, 0.0] for pair in both]),
            np.array([[v.bytes_always for v in pair] or [0.0, 0.0] for pair in both]),
        )


def _alike(variants: tuple[LayerVariant, ...]) -> bool:
    return all(
        v.parameter_bytes == variants[0].parameter_bytes
        and v.sync_forward == variants[0].sync_forward
        and v.sync_backward == variants[0].sync_backward
        for v in variants[1:]
    )


def _flights(memory: float, slope: Array, always: Array, tolerance: float) -> Array:
    """Most y with slope · y + always <= memory."""
    room = memory * (1 + tolerance) - always
    most = np.divide(room, slope, out=np.full_like(room, _MOST_FLIGHTS), where=slope > 0)
    most = np.where((slope <= 0) & (room < 0), _FEWEST_FLIGHTS, most)
    return np.clip(np.floor(most), _FEWEST_FLIGHTS, _MOST_FLIGHTS)
