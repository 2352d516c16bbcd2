"""Six constants for a device and its fabric, fitted on published step times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raypar.mesh.calibration import (
    Calibration,
    DeviceRates,
    LinkRates,
    MatmulCurve,
    MemoryCurve,
    TierRates,
)
from raypar.mesh.cluster import Cluster
from release._layered import Job, layers_of, memory_bytes, step_seconds
from release._published_rows import Row, head_counts, shapes

OPTIMIZER_PASSES = 28
"""Adam in mixed precision, in bytes moved per byte of half-precision parameters: gradients are
copied to float32, unscaled, measured and clipped (26 bytes per parameter), Adam reads four float32
tensors and writes three (28), and the weights are rounded again (2)."""
_KERNEL_S = 4e-6
_NOISE = 0.04


@dataclass(frozen=True)
class Constant:
    """One constant: where it is expected, and how sure that is (in logarithms)."""

    expected: float
    spread: float
    least: float
    most: float


CONSTANTS: Mapping[str, Constant] = {
    "matmul_top": Constant(0.75, 0.12, 0.4, 0.95),
    "matmul_half_s": Constant(8e-6, 0.7, 1e-6, 1e-4),
    "memory": Constant(0.80, 0.12, 0.4, 0.95),
    "inside_efficiency": Constant(0.75, 0.25, 0.2, 0.95),
    "across_efficiency": Constant(0.6, 0.35, 0.1, 0.95),
    "latency_s": Constant(8e-6, 0.7, 1e-6, 1e-4),
}
"""``matmul_half_s``: how much longer than at full rate any product takes, in seconds (as FLOPs of
the full rate it is the curve's ``half``); ``memory``, ``*_efficiency``: shares of the vendor's
figures; ``latency_s``: of one message or round, near or far."""


def calibration_of(values: Mapping[str, float], cluster: Cluster, note: str) -> Calibration:
    """The constants as a calibration."""
    kind = cluster.nodes[0].device
    rate = kind.bandwidth * values["memory"]
    top = values["matmul_top"]
    curve = MatmulCurve(top, values["matmul_half_s"] * top * kind.peak("float16"))
    step = rate / OPTIMIZER_PASSES
    rates = DeviceRates(
        {"float16": curve},
        {"plain": MemoryCurve(rate, rate)},
        _KERNEL_S,
        MemoryCurve(step, step),
    )
    latency = values["latency_s"]
    return Calibration(
        {kind.name: rates},
        TierRates(LinkRates(latency, values["inside_efficiency"])),
        TierRates(LinkRates(latency, values["across_efficiency"])),
        measured=True,
        note=note,
    )


def candidates(row: Row, memory: int) -> list[tuple[int, Job]]:
    """(heads, job): every way to run a row that fits `memory` bytes; if none, the leanest."""
    found = []
    for heads in head_counts(row):
        layers = layers_of(row.hidden, heads, row.tensor, row.sequence, row.vocabulary)
        found += [(heads, Job(layers, row.layers, size, shape)) for size, shape in shapes(row)]
    fitting = [one for one in found if memory_bytes(one[1]) <= memory]
    return fitting or [min(found, key=lambda one: memory_bytes(one[1]))]


@dataclass
class Case:
    """A row with its cluster and the ways it may have been run.

    Attributes:
        row: The row.
        cluster: Its devices.
        ways: (heads, job).
        ratio: What the simulator says over what the stand-in says, where both are known.
    """

    row: Row
    cluster: Cluster
    ways: list[tuple[int, Job]]
    ratio: float = 1.0

    def best(self, calibration: Calibration) -> tuple[int, Job]:
        """The fastest way."""
        return min(self.ways, key=lambda w: step_seconds(w[1], self.cluster, calibration))


def fit(cases: Sequence[Case], start: Mapping[str, float] | None = None) -> dict[str, float]:
    """Constants for which the stand-in comes nearest to the published times.

    Squared logarithms of the errors, relative to an error of 4 % that is expected anyway, and of
    the constants' distance from where they are expected; minimised one constant at a time with
    ever smaller steps. What the rows say nothing about stays where it is expected.
    """
    values = dict(start or {name: c.expected for name, c in CONSTANTS.items()})
    for step in (0.2, 0.1, 0.05, 0.02, 0.01):
        calibrations = [calibration_of(values, case.cluster, "") for case in cases]
        jobs = [case.best(cal)[1] for case, cal in zip(cases, calibrations, strict=True)]
        values = _descend(values, cases, jobs, step)
    return values


def _descend(
    values: dict[str, float], cases: Sequence[Case], jobs: Sequence[Job], step: float
) -> dict[str, float]:
    least = _loss(values, cases, jobs)
    moved, rounds = True, 0
    while moved and rounds < 12:
        moved, rounds = False, rounds + 1
        for name, constant in CONSTANTS.items():
            wide = step * constant.spread / 0.2
            for factor in (math.exp(wide), math.exp(-wide)):
                tried = {**values, name: values[name] * factor}
                if not constant.least <= tried[name] <= constant.most:
                    continue
                found = _loss(tried, cases, jobs)
                if found < least - 1e-6:
                    values, least, moved = tried, found, True
                    break
    return values


def _loss(values: Mapping[str, float], cases: Sequence[Case], jobs: Sequence[Job]) -> float:
    total = 0.0
    for case, job in zip(cases, jobs, strict=True):
        calibration = calibration_of(values, case.cluster, "")
        predicted = case.ratio * step_seconds(job, case.cluster, calibration)
        total += (math.log(predicted / case.row.published_s) / _NOISE) ** 2
    for name, constant in CONSTANTS.items():
        total += (math.log(values[name] / constant.expected) / constant.spread) ** 2
    return total


def left_out(cases: Sequence[Case], fitted: Mapping[str, float]) -> list[float]:
    """Each row predicted, in seconds, with constants fitted on all the others."""
    found = []
    for i, case in enumerate(cases):
        others = [c for j, c in enumerate(cases) if j != i]
        values = fit(others, fitted) if others else fitted
        calibration = calibration_of(values, case.cluster, "")
        _, job = case.best(calibration)
        found.append(case.ratio * step_seconds(job, case.cluster, calibration))
    return found
