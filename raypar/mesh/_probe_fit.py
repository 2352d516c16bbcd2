"""From timings to constants, by least squares of relative errors."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from raypar.mesh._probe_device import DeviceSamples, Sample
from raypar.mesh.calibration import (
    DeviceRates,
    LinkRates,
    MatmulCurve,
    MemoryCurve,
    TierRates,
    default_rates,
)
from raypar.mesh.devices import DeviceKind, Link

_REORDERED = ("conv", "conv_backward")
"""Forms of product whose bytes cost extra, besides the products."""


class LinkSample(NamedTuple):
    """One measured exchange.

    Attributes:
        kind: ``p2p`` or a collective.
        size: Ranks that took part.
        nbytes: Bytes of the larger side on one rank.
        seconds: Median time.
    """

    kind: str
    size: int
    nbytes: float
    seconds: float


def non_negative(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients >= 0 of ``seconds ≈ Σ c_i columns_i`` with the least relative squared error.

    Of the fits with some coefficients left out (they are few), the best one without a negative
    coefficient: the active-set solution of Lawson and Hanson (1974), found by trying all sets.
    """
    weights = 1.0 / np.asarray(seconds)
    table = np.asarray(columns, dtype=float).T * weights[:, None]
    best: tuple[float, list[float]] | None = None
    n = table.shape[1]
    for chosen in range(1, 1 << n):
        used = [i for i in range(n) if chosen >> i & 1]
        scale = np.linalg.norm(table[:, used], axis=0)
        scale[scale == 0] = 1.0
        found, *_ = np.linalg.lstsq(table[:, used] / scale, np.ones(len(weights)), rcond=None)
        found = found / scale
        if (found < 0).any():
            continue
        error = float(np.sum((table[:, used] @ found - 1.0) ** 2))
        if best is None or error < best[0] - 1e-12:
            values = [0.0] * n
            for i, value in zip(used, found, strict=True):
                values[i] = float(value)
            best = error, values
    assert best is not None  # a single non-negative column always has a non-negative coefficient
    return best[1]


def fit_matmul(samples: Sequence[Sample], peak: float, overhead: float) -> MatmulCurve:
    """The curve of one dtype and form: time is a constant plus FLOPs over a rate."""
    left = [max(s.seconds - overhead, s.seconds / 10) for s in samples]
    fixed, per_flop = non_negative([[1.0] * len(left), [s.flops for s in samples]], left)
    if per_flop == 0.0:
        return MatmulCurve(min(s.flops / t for s, t in zip(samples, left, strict=True)) / peak, 0.0)
    return MatmulCurve(1.0 / (per_flop * peak), fixed / per_flop)


def fit_reordered(
    samples: Sequence[Sample], peak: float, overhead: float
) -> tuple[MatmulCurve, MemoryCurve | None]:
    """The same where bytes cost extra: (curve of the products, rate of the bytes)."""
    left = [max(s.seconds - overhead, s.seconds / 10) for s in samples]
    columns = [[s.flops for s in samples], [s.nbytes for s in samples]]
    per_flop, per_byte = non_negative(columns, left)
    if per_flop == 0.0:
        return fit_matmul(samples, peak, overhead), None
    curve = MatmulCurve(1.0 / (per_flop * peak), 0.0)
    return curve, MemoryCurve(1.0 / per_byte, 1.0 / per_byte) if per_byte else None


def fit_memory(sizes: Sequence[float], seconds: Sequence[float], overhead: float) -> MemoryCurve:
    """Two rates with a knee between them; one rate where that is as good."""
    left = [max(t - overhead, t / 10) for t in seconds]
    (slope,) = non_negative([sizes], left)
    best = MemoryCurve(1.0 / slope, 1.0 / slope)
    least = _error(best, sizes, left)
    for knee in sorted(set(sizes))[1:-1]:
        near = [min(b, knee) for b in sizes]
        far = [max(b - knee, 0.0) for b in sizes]
        slow, slower = non_negative([near, far], left)
        if slow == 0.0 or slower == 0.0:
            continue
        curve = MemoryCurve(1.0 / slow, 1.0 / slower, knee)
        error = _error(curve, sizes, left)
        if error < 0.9 * least:
            best, least = curve, error
    return best


def _error(curve: MemoryCurve, sizes: Sequence[float], seconds: Sequence[float]) -> float:
    return sum((curve.seconds(b) / t - 1.0) ** 2 for b, t in zip(sizes, seconds, strict=True))


def merged(ranks: Sequence[DeviceSamples]) -> DeviceSamples:
    """The samples of ranks that measured the same things: the median of each."""
    first = ranks[0]
    ops = [
        own._replace(seconds=statistics.median(r.ops[i].seconds for r in ranks))
        for i, own in enumerate(first.ops)
    ]
    steps = [
        (b, n, statistics.median(r.optimizer[i][2] for r in ranks))
        for i, (b, n, _) in enumerate(first.optimizer)
    ]
    return DeviceSamples(
        ops,
        statistics.median(r.overhead for r in ranks),
        statistics.median(r.view_overhead for r in ranks),
        steps,
    )


def fit_device(samples: DeviceSamples, kind: DeviceKind) -> DeviceRates:
    """The constants of a device kind."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples.ops:
        groups.setdefault((sample.kind, sample.dtype), []).append(sample)
    overhead = samples.overhead
    matmul: dict[str, MatmulCurve] = {}
    memory: dict[str, MemoryCurve] = {}
    for (form, dtype), found in groups.items():
        peak = kind.peak(dtype)
        if form == "matmul":
            matmul[dtype] = fit_matmul(found, peak, overhead)
        elif form in _REORDERED:
            curve, bytes_curve = fit_reordered(found, peak, overhead)
            matmul[f"{dtype}/{form}"] = curve
            if bytes_curve is not None:
                memory[form] = bytes_curve
        elif found[0].flops:
            matmul[f"{dtype}/{form}"] = fit_matmul(found, peak, overhead)
        else:
            memory[form] = fit_memory(
                [s.nbytes for s in found], [s.seconds for s in found], overhead
            )
    optimizer, per_tensor = _fit_optimizer(samples.optimizer, kind)
    views = 0.0 if kind.is_gpu else samples.view_overhead
    return DeviceRates(matmul, memory, overhead, optimizer, per_tensor, views)


def _fit_optimizer(
    steps: Sequence[tuple[float, int, float]], kind: DeviceKind
) -> tuple[MemoryCurve, float]:
    sizes = [b for b, _, _ in steps]
    per_byte, per_tensor = non_negative(
        [sizes, [float(n) for _, n, _ in steps]], [t for _, _, t in steps]
    )
    if per_byte == 0.0:
        return default_rates(kind).optimizer, per_tensor
    left = [max(t - n * per_tensor, t / 10) for _, n, t in steps]
    return fit_memory(sizes, left, 0.0), per_tensor


_VOLUME = {"all_reduce": 2, "all_max": 2, "p2p": 1}


def fit_tier(samples: Sequence[LinkSample], link: Link) -> TierRates | None:
    """The constants of a link tier; None without measurements."""
    groups: dict[str, list[LinkSample]] = {}
    for sample in samples:
        groups.setdefault(sample.kind, []).append(sample)
    if "p2p" not in groups:
        return None
    rates = {kind: _fit_link(kind, found, link) for kind, found in groups.items()}
    p2p = rates.pop("p2p")
    return TierRates(p2p, rates)


def _fit_link(kind: str, samples: Sequence[LinkSample], link: Link) -> LinkRates:
    times = _VOLUME.get(kind, 1)
    rounds, moved = [], []
    for s in samples:
        part = 1.0 if kind == "p2p" else (s.size - 1) / s.size
        rounds.append(times * float(np.ceil(np.log2(s.size))) if kind != "p2p" else 1.0)
        moved.append(times * part * s.nbytes)
    latency, per_byte = non_negative([rounds, moved], [s.seconds for s in samples])
    if per_byte == 0.0:
        per_byte = 1.0 / link.bandwidth
    return LinkRates(latency, 1.0 / (per_byte * link.bandwidth))


def by_kind(
    ranks: Sequence[tuple[str, DeviceSamples]], kinds: Mapping[str, DeviceKind]
) -> dict[str, DeviceRates]:
    """Device kind → constants, from (kind, samples) of every rank."""
    return {
        name: fit_device(merged([s for own, s in ranks if own == name]), kind)
        for name, kind in kinds.items()
        if any(own == name for own, _ in ranks)
    }
