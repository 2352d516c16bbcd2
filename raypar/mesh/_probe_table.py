"""Measured rates beside a row of the device table: is the row right?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from raypar.mesh._probe_device import DeviceSamples
from raypar.mesh.devices import DeviceKind

_STREAMS = ("plain", "copy", "stream")
"""Classes of op that do little but move bytes."""
_LARGE = 1 << 28
"""Bytes of one op from which on no cache of a GPU holds them."""
_LEAST, _MOST = 0.35, 1.05


class Verdict(NamedTuple):
    """One figure of the table beside what was reached.

    Attributes:
        what: ``memory bandwidth``, or the dtype of matrix products.
        found: The best that was measured, per second.
        listed: What the table says.
    """

    what: str
    found: float
    listed: float

    @property
    def share(self) -> float:
        """What was reached of what is listed."""
        return self.found / self.listed

    @property
    def verdict(self) -> str:
        """``plausible``, or what is wrong."""
        if self.share > _MOST:
            return "more than the table lists: the row is of a smaller device"
        if self.share < _LEAST:
            return "far below the table: the row is of a larger device, or this one is in use"
        return "plausible"


def reached(samples: DeviceSamples) -> dict[str, list[tuple[float, float]]]:
    """For each dtype (FLOPs of one matrix product, FLOP/s), as they were measured."""
    found: dict[str, list[tuple[float, float]]] = {}
    for sample in samples.ops:
        if sample.kind == "matmul":
            found.setdefault(sample.dtype, []).append((sample.flops, sample.flops / sample.seconds))
    return {dtype: sorted(rates) for dtype, rates in found.items()}


def bandwidth(samples: DeviceSamples) -> float | None:
    """Bytes per second of the fastest large op that only moves bytes; None without one.

    Without an op that no cache could hold, the largest of each class stands in.
    """
    moved = [s for s in samples.ops if s.kind in _STREAMS]
    if not moved:
        return None
    most = max(s.nbytes for s in moved)
    large = [s for s in moved if s.nbytes >= min(_LARGE, most)]
    return max(s.nbytes / s.seconds for s in large)


def against_table(samples: DeviceSamples, kind: DeviceKind) -> list[Verdict]:
    """Every measured dtype, and the memory, beside the table."""
    peaks: Mapping[str, float] = kind.flops
    found = [
        Verdict(dtype, max(rate for _, rate in rates), peaks[dtype])
        for dtype, rates in reached(samples).items()
        if dtype in peaks
    ]
    moved = bandwidth(samples)
    if moved is not None:
        found.append(Verdict("memory bandwidth", moved, kind.bandwidth))
    return found
