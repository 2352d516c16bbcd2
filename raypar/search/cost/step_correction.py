"""What a simulated step misses, learned from plans that really ran."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raypar.plan import DATA, Plan
from raypar.search.cost.rows import StepRow
from raypar.search.simulation import Simulation

Features = Mapping[str, float]
Array = Any

_RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}


def step_features(plan: Plan, simulation: Simulation) -> dict[str, float]:
    """What a plan's step may owe its error to; about 1 apart where plans are very different.

    Sizes are binary logarithms; shares are those of the simulated step.
    """
    stages = plan.stages
    spans = max(plan.schedule.placement, default=(0, 0))
    instructions = sum(len(simulation._lists[lane.group]) for lane in simulation.lanes)
    devices = [len(lane.devices) for lane in simulation.lanes]
    whole = sum(devices) or 1
    return {
        "stages": math.log2(len(stages)),
        "groups": math.log2(spans[0] + 1),
        "replicas": math.log2(plan.replicas),
        "tensor": math.log2(max(math.prod(n for _, n in s.mesh.inner) for s in stages)),
        "microbatches": math.log2(plan.microbatches),
        "schedule:" + plan.schedule.name: 1.0,
        "recompute": sum(_RECOMPUTED[s.memory.recompute] for s in stages) / len(stages),
        "zero": float(max(s.memory.zero for s in stages)),
        "axes": float(max(sum(name != DATA for name in s.mesh.axes) for s in stages)),
        "communication": sum(
            n * lane.communication for n, lane in zip(devices, simulation.lanes, strict=True)
        )
        / whole,
        "bubble": simulation.bubble,
        "instructions": math.log2(max(instructions, 1)),
        "seconds": math.log2(max(simulation.step_s, 1e-6)) / 2,
    }


class StepCorrection:
    """Factor from simulated to measured step times, with its uncertainty.

    A Gaussian process over `step_features` (Rasmussen and Williams 2006, "Gaussian Processes for
    Machine Learning", ch. 2) on the logarithm of measured over simulated: a level that all plans
    share, a slope for every feature, and a smooth remainder. Without measurements the factor is 1
    and wide. How much it may vary is chosen by marginal likelihood among a few settings.
    """

    LEVEL, NOISE = 0.25, 0.02
    """Standard deviation of the shared level, and of one measurement of typical spread."""
    FEW = 6
    SETTINGS = tuple(
        (slope, smooth) for slope in (0.02, 0.06, 0.12) for smooth in (0.03, 0.08, 0.16)
    )

    def __init__(self) -> None:
        self._names: list[str] = []
        self._seen: Array = None
        self._mean: Array = None
        self._factor: Array = None
        self._setting = self.SETTINGS[-1]

    @classmethod
    def fit(cls, rows: Sequence[StepRow]) -> StepCorrection:
        """Learns from measured steps."""
        self = cls()
        if not rows:
            return self
        self._names = sorted({name for row in rows for name in row.features})
        self._seen = np.array([self._vector(row.features) for row in rows])
        ratios = np.log([row.measured_s / row.simulated_s for row in rows])
        noise = np.diag([self.NOISE**2 * (1.0 + 1.0 / row.count) for row in rows])
        best = -math.inf
        # Few rows cannot tell how much may vary: then it is a lot.
        for setting in self.SETTINGS if len(rows) >= self.FEW else self.SETTINGS[-1:]:
            gram = self._kernel(self._seen, self._seen, setting) + noise
            factor = np.linalg.cholesky(gram)
            mean = np.linalg.solve(gram, ratios)
            score = float(-0.5 * ratios @ mean - np.log(np.diag(factor)).sum())
            if score > best:
                best, self._setting, self._factor, self._mean = score, setting, factor, mean
        return self

    def predict(self, features: Features) -> tuple[float, float]:
        """(factor on the simulated step, sigma of its logarithm) for a plan."""
        if self._seen is None:
            slope, smooth = self._setting
            return 1.0, math.sqrt(self.LEVEL**2 + slope**2 + smooth**2)
        at = self._vector(features)[None]
        # A feature value that no measured plan had, a schedule say, is one more thing unknown.
        new = sum(abs(v) > 0 for name, v in features.items() if name not in self._names)
        to_seen = self._kernel(at, self._seen, self._setting)
        own = float(self._kernel(at, at, self._setting)[0, 0])
        half = np.linalg.solve(self._factor, to_seen[0])
        variance = own - float(half @ half) + self.NOISE**2 + new * self._setting[0] ** 2
        mean = float((to_seen @ self._mean)[0])
        return math.exp(min(max(mean, -3.0), 3.0)), math.sqrt(max(variance, self.NOISE**2))

    def _vector(self, features: Features) -> Array:
        return np.array([float(features.get(name, 0.0)) for name in self._names])

    def _kernel(self, a: Array, b: Array, setting: tuple[float, float]) -> Array:
        slope, smooth = setting
        center = self._seen.mean(0)
        a, b = a - center, b - center
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        found = self.LEVEL**2 + slope**2 * (a @ b.T) + smooth**2 * np.exp(-0.5 * squared / 4.0)
        return np.asarray(found)
