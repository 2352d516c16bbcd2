"""Seconds of kernels on the devices of a cluster, at the least, however they are shared out.

A kernel of one microbatch on one replica runs on all n ranks of its stage's inner mesh. Together
they do at least its whole work: a split divides it, anything else repeats some. The seconds of a
rank grow with its share at least in proportion once a launch is paid, so that n ranks together take
least where the shares are equal; the two cases that can be least are n = 1, and more ranks whose
smaller parts stay in near memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raypar.mesh.calibration import Calibration, DeviceRates, MemoryCurve
from raypar.mesh.cluster import Cluster
from raypar.mesh.devices import DeviceKind
from raypar.search.bounds.one_op import ANY_KIND, Kernel

Floats = npt.NDArray[np.float64]
_ROUNDS = 200


@dataclass(frozen=True)
class Devices:
    """The devices of a cluster by kind.

    Attributes:
        kinds: Different devices with what they reach.
        counts: How many there are of each.
    """

    kinds: tuple[tuple[DeviceKind, DeviceRates], ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, cluster: Cluster, calibration: Calibration) -> Devices:
        """Counts the devices of a cluster."""
        counts: Counter[str] = Counter()
        kinds: dict[str, DeviceKind] = {}
        for node in cluster.nodes:
            counts[node.device.name] += node.devices
            kinds[node.device.name] = node.device
        pairs = tuple((kind, calibration.rates(kind)) for kind in kinds.values())
        return cls(pairs, tuple(counts[name] for name in kinds))

    @property
    def total(self) -> int:
        """How many devices there are."""
        return sum(self.counts)

    def seconds(self, kernels: Sequence[Kernel], most_ranks: int) -> Floats:
        """Least device-seconds of each kernel on each kind: ``[kernels, kinds]``.

        Args:
            kernels: Kernels of one microbatch on one replica; counts are not applied.
            most_ranks: Most ranks of one replica of a stage.
        """
        return np.array(
            [[kernel_s(k, kind, rates, most_ranks) for kind, rates in self.kinds] for k in kernels]
        ).reshape(len(kernels), len(self.kinds))

    def latencies(self, kernels: Sequence[Kernel], ranks: Sequence[int]) -> Floats:
        """Least seconds of each kernel on one rank of so many: ``[kernels, kinds, ranks]``."""
        found = np.zeros((len(kernels), len(self.kinds), len(ranks)))
        parts = np.array(ranks, dtype=float)
        for i, kernel in enumerate(kernels):
            for j, (kind, rates) in enumerate(self.kinds):
                launch = kernel.calls * rates.overhead
                alone = _work_s(kernel, kind, rates, 1, False)
                one, two = (_work_s(kernel, kind, rates, n, True) for n in (1, 2))
                # A product is a constant and a share; the larger of two such is at least one.
                constant = max(0.0, two - one)
                found[i, j] = launch + np.where(
                    parts == 1, alone, constant + (one - constant) / parts
                )
        return found

    def at_most(self, devices: int) -> Devices:
        """Where no more than so many devices are used: as many of each kind at the most."""
        return Devices(self.kinds, tuple(min(count, devices) for count in self.counts))

    def prices(self, work: Floats) -> Floats:
        """Prices of a second of a device of each kind: work costs at least the time it takes.

        The linear program ``min T: every row is done, no kind works longer than T on each of its
        devices`` is bounded from below by its dual at any prices y >= 0 of a second of a device
        with ``sum(counts * y) = 1``: ``sum over rows of min over kinds of y * seconds`` (weak
        duality). Prices are improved a few times; each round is a valid bound.

        Args:
            work: Device-seconds of each row on each kind.
        """
        counts = np.array(self.counts, dtype=float)
        prices = 1.0 / np.maximum(work.sum(axis=0), 1e-30)
        found = prices = prices / (counts @ prices)
        best = 0.0
        rows = np.arange(len(work))
        for round_ in range(_ROUNDS if len(counts) > 1 else 0):
            prices = prices / (counts @ prices)
            weighted = work * prices
            total = float(weighted.min(axis=1).sum())
            if total > best:
                best, found = total, prices
            choice = weighted.argmin(axis=1)
            load = np.bincount(choice, work[rows, choice], minlength=len(counts)) / counts
            if load.max() <= 0:
                break
            # A kind that is loaded more than others becomes dearer, by less and less.
            prices = prices * np.exp((load - load.mean()) / load.max() / (4 + round_))
        return found


def kernel_s(kernel: Kernel, kind: DeviceKind, rates: DeviceRates, most_ranks: int) -> float:
    """Least device-seconds of one kernel on ranks of one kind."""
    alone = kernel.calls * rates.overhead + _work_s(kernel, kind, rates, 1, False)
    if most_ranks < 2:
        return alone
    return min(alone, 2 * kernel.calls * rates.overhead + _work_s(kernel, kind, rates, 2, True))


def _work_s(kernel: Kernel, kind: DeviceKind, rates: DeviceRates, ranks: int, near: bool) -> float:
    """Seconds besides launches of at least `ranks` ranks, whose bytes may all be near."""
    if not kernel.matmul:
        return _moved_s(kernel.nbytes, _curves(kernel.kind, rates), near)
    curve = rates.curve(kernel.dtype, kernel.kind)
    peak = kind.peak(kernel.dtype)
    product = (kernel.flops + ranks * curve.half) / (curve.top * peak) if kernel.flops > 0 else 0.0
    if kernel.kind in rates.memory:
        return product + _moved_s(kernel.nbytes, [rates.memory[kernel.kind]], near)
    return max(product, _moved_s(kernel.nbytes, [rates.bytes_curve("plain")], near))


def _curves(kind: str, rates: DeviceRates) -> list[MemoryCurve]:
    return list(rates.memory.values()) if kind == ANY_KIND else [rates.bytes_curve(kind)]


def _moved_s(nbytes: float, curves: Sequence[MemoryCurve], near: bool) -> float:
    return min(
        nbytes / max(c.near, c.far) if near or c.far > c.near else c.seconds(nbytes) for c in curves
    )


def linear_s(curve: MemoryCurve, nbytes: float) -> float:
    """Least seconds to move bytes in any number of pieces."""
    return nbytes / max(curve.near, curve.far)
