"""How many devices the layers of a downset need at least, given the replicas behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raypar.search.exact._piper_figures import DegreeFigures
from raypar.search.exact._piper_formula import PiperSetting
from raypar.search.exact._piper_labels import Array, Index
from raypar.search.exact._piper_lattice import Family

_MOST_SUMS = 40
_PRICES = 7


class Rest:
    """A Lagrangian bound on devices.

    With S replicas behind it, a stage of d·t devices has load at least the bound L = compute/d, and
    at least S + d microbatches in flight over its d replicas. So for any price m of a byte,
    (L + m·M)·d·t is no less than the sum over its layers of the least t·(p + m·(A·(S + 1) + B)),
    and these sums add up over all stages. A price makes recomputation that memory forces count.

    Args:
        family: The downsets.
        figures: Per tensor-parallel degree.
        setting: The machine.

    Attributes:
        at: Sum of replicas → its column in `table`.
        table: ``[downset, column]``: devices, under the bound of the last `update`.
    """

    def __init__(
        self, family: Family, figures: Sequence[DegreeFigures], setting: PiperSetting
    ) -> None:
        k = setting.devices
        sums = np.unique(np.geomspace(1, k + 1, _MOST_SUMS).astype(np.int64) - 1)
        self.at = np.searchsorted(sums, np.arange(k + 2), "right") - 1
        self.memory, self.devices = setting.memory, k
        # The last one counts bytes alone.
        self.prices = np.append(self._prices(figures), 1.0)
        self.seconds = np.append(np.ones(len(self.prices) - 1), 0.0)
        columns = [
            self._least(figures, seconds, price, int(s))
            for seconds, price in zip(self.seconds, self.prices, strict=True)
            for s in sums
        ]
        weights = family.members.astype(np.float64) @ np.stack(columns, axis=1)
        self._weights = weights.reshape(len(family), len(self.prices), len(sums))
        self.table: npt.NDArray[np.int64] = np.zeros((len(family), len(sums)), np.int64)

    @staticmethod
    def _prices(figures: Sequence[DegreeFigures]) -> Array:
        """Nothing, and what bytes cost where layers are recomputed, from low to high."""
        ratios: list[float] = []
        for one in figures:
            for flights in (1, 4, 16, 64):
                steps = one.steps(flights)
                ratios += (steps.cost / steps.saving).tolist()
        found = np.quantile(ratios, np.linspace(0.05, 0.95, _PRICES)) if ratios else np.zeros(0)
        return np.unique(np.concatenate([[0.0], found]))

    @staticmethod
    def _least(
        figures: Sequence[DegreeFigures], seconds: float, price: float, behind: int
    ) -> Array:
        """Per layer the least device-seconds and device-bytes at their prices."""
        found = np.full(len(figures[0].variants), np.inf)
        for one in figures:
            for at, variants in enumerate(one.variants):
                for v in variants:
                    nbytes = v.bytes_per_flight * (behind + 1) + v.bytes_always
                    found[at] = min(found[at], one.degree * (seconds * v.seconds + price * nbytes))
        return found

    def update(self, bound: float) -> None:
        """Works the table out for a bound on the load."""
        scale = self.seconds * bound + self.prices * self.memory
        devices = (self._weights / np.maximum(scale, 1e-300)[None, :, None]).max(axis=1)
        self.table = np.ceil(np.minimum(devices, 2.0**40) * (1 - 1e-9)).astype(np.int64)

    def least_bound(self) -> float:
        """Least bound on the load under which the whole model needs no more than the devices."""
        rest = self._weights[0, :, 0] / self.devices - self.prices * self.memory
        if rest[-1] > 0:
            return float("inf")  # bytes alone take more than there is
        return max(0.0, float(rest[:-1].max()))

    def of(self, downsets: Index, behind: Index) -> Index:
        """Devices that downsets need with so many replicas behind them."""
        found: Index = self.table[downsets, self.at[behind]]
        return found
