"""Regression of measured over predicted seconds from few measurements, with its uncertainty.

A measured time is modelled as ``log t = log Σ_c s_c exp(θ_c) + w · h + g(x) + noise``: every class
of op (a `Column`) has a factor of its own on its analytic seconds ``s_c``, traits ``h`` of the
whole act on it linearly, and a smooth function ``g`` of traits ``x`` takes what is left. All
unknowns have Gaussian priors around zero: without data the prediction is the analytic one, and far
from data it returns to it; factors of neighbouring sizes and of one family vary together. The
posterior is found by Gauss–Newton steps (Laplace's method, MacKay 2003, "Information Theory,
Inference and Learning Algorithms", ch. 27), outliers count less (Student's t by reweighting, Lange
et al. 1989), and ``g`` is a Gaussian process on inducing points whose missing variance is noise
(FITC, Snelson and Ghahramani 2005, "Sparse Gaussian processes using pseudo-inputs").

How much may vary is chosen by the predictive density of whole groups of rows left out (stages of
one model), and the noise is scaled so that such predictions are as far off as they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from raypar.search.cost.features import Column

Array = Any  # numpy arrays of float64
_DEGREES = 4.0
"""Of Student's t: the fewer, the less do outliers count."""
_STEPS = 4
_MOST_INDUCING = 48
_GROUPS = 10
_Z80 = 1.2816
"""A normal variable is within this many sigmas with a probability of 80 %."""


class Row(NamedTuple):
    """One measurement of a time that is predicted as a sum.

    Attributes:
        seconds: What is predicted, by column.
        traits: Of the whole (`raypar.search.cost.features.TRAITS`).
        measured: Seconds.
        group: Rows of one model; they are left out together where the fit is judged.
        weight: How often it was measured.
    """

    seconds: Mapping[Column, float]
    traits: tuple[float, ...]
    measured: float = 1.0
    group: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Priors:
    """Standard deviations of logarithms before anything was measured.

    Attributes:
        common: Of a factor that all columns of a device share.
        family: Of one that a family of columns shares.
        kind: Of one that all sizes of a kind share.
        size: Of what differs between sizes of a kind.
        trait: Of the effect of one unit of a trait.
        smooth: Of the smooth remainder.
        length: Distance, in standard deviations of the traits, over which the remainder varies.
        noise: Of one measurement.
    """

    common: float = 0.15
    family: float = 0.15
    kind: float = 0.3
    size: float = 0.25
    trait: float = 0.05
    smooth: float = 0.1
    length: float = 2.0
    noise: float = 0.04

    def spread(self) -> float:
        """Of one column's factor in all: how wrong the analytic model may be about it."""
        return math.sqrt(self.common**2 + self.family**2 + self.kind**2 + self.size**2)


CANDIDATES = tuple(
    Priors(kind=kind, family=kind / 2, size=0.8 * kind, smooth=smooth, length=length, noise=noise)
    for kind, (smooth, length), noise in product(
        (0.2, 0.4, 0.7), ((0.0, 2.0), (0.06, 2.0), (0.12, 1.5)), (0.03, 0.06)
    )
)
"""Priors among which a fit chooses."""


@dataclass
class _Scale:
    """Brings traits to mean 0 and spread 1; those that never vary stay as they are."""

    mean: Array
    spread: Array

    @classmethod
    def of(cls, traits: Array) -> _Scale:
        spread = traits.std(0)
        return cls(traits.mean(0), np.where(spread > 1e-6, spread, 1.0))

    def __call__(self, traits: Array) -> Array:
        return (traits - self.mean) / self.spread


def _inducing(points: Array, most: int) -> Array:
    """Up to `most` of the points, each as far from those before as can be (Gonzalez 1985)."""
    chosen = [0]
    far = ((points - points[0]) ** 2).sum(1)
    while len(chosen) < min(most, len(points)):
        at = int(far.argmax())
        if far[at] < 1e-3:
            break
        chosen.append(at)
        far = np.minimum(far, ((points - points[at]) ** 2).sum(1))
    return points[chosen]


def _kernel(a: Array, b: Array, length: float) -> Array:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
    return np.exp(-0.5 * np.maximum(squared, 0.0) / length**2)


def _prior_covariance(columns: Sequence[Column], priors: Priors) -> Array:
    """Covariance of the columns' factors."""
    n = len(columns)
    names: list[list[str]] = [
        [c.device for c in columns],
        [f"{c.device}/{c.family}" for c in columns],
        [f"{c.device}/{c.family}/{c.kind}" for c in columns],
    ]
    found = np.zeros((n, n))
    for level, sigma in zip(names, (priors.common, priors.family, priors.kind), strict=True):
        text = np.array(level)
        found += sigma**2 * (text[:, None] == text[None])
    size = np.array([c.size for c in columns], dtype=float)
    kind = np.array(names[2])
    near = np.exp(-0.5 * (size[:, None] - size[None]) ** 2)
    found += priors.size**2 * near * (kind[:, None] == kind[None])
    return found + 1e-9 * np.eye(n)


@dataclass
class _Design:
    """What rows look like to the linear algebra.

    Attributes:
        seconds: [rows, columns].
        traits: [rows, traits], scaled.
        smooth: [rows, inducing points].
        missing: [rows] share of the remainder's variance that the inducing points do not explain.
    """

    seconds: Array
    traits: Array
    smooth: Array
    missing: Array
    unknown: Array = field(default_factory=lambda: np.zeros(0))


@dataclass
class Predicted:
    """A time and how sure it is.

    Attributes:
        log: Logarithm of the factor on the analytic seconds.
        sigma: Standard deviation of the logarithm of the time, measuring it included.
    """

    log: float
    sigma: float


class WorkRegression:
    """The regression; see the module.

    Attributes:
        priors: What the last fit chose.
        calibrated: By how much sigmas were scaled after looking at groups left out.
    """

    def __init__(self, priors: Priors | None = None) -> None:
        self.priors = priors or Priors()
        self.calibrated = 1.0
        self._fixed = priors is not None
        self._columns: list[Column] = []
        self._index: dict[Column, int] = {}
        self._scale: _Scale | None = None
        self._points: Array = None
        self._root: Array = None
        self._mean: Array = None
        self._covariance: Array = None

    @property
    def fitted(self) -> bool:
        """Whether it has seen any row."""
        return self._mean is not None

    def fit(self, rows: Sequence[Row], *, choose: bool = True) -> None:
        """Learns from rows, forgetting what it knew.

        Args:
            rows: Measurements; those without a positive, finite time or prediction are skipped.
            choose: Whether priors and calibration are chosen anew; a refit after few more rows
                keeps them.
        """
        kept = [row for row in rows if _usable(row)]
        if not kept:
            self._mean = None
            return
        measured = np.log([row.measured for row in kept])
        weights = np.array([min(row.weight, 4.0) for row in kept])
        groups = _grouped([row.group for row in kept])
        self._survey(kept)
        if choose and not self._fixed and len(set(groups)) > 2:
            self._choose(kept, measured, weights, groups)
        design = self._design(kept)
        self._solve(design, measured, weights)
        if choose and len(set(groups)) > 2:
            self._calibrate(design, measured, weights, groups)

    def predict(self, rows: Sequence[Row]) -> list[Predicted]:
        """What rows take; their `measured` does not count."""
        return [self._one(row) for row in rows]

    def joint(self, rows: Sequence[Row]) -> tuple[list[Predicted], float]:
        """The same, and the sigma of the logarithm of their sum."""
        found = self.predict(rows)
        whole = [
            sum(row.seconds.values()) * math.exp(p.log) for row, p in zip(rows, found, strict=True)
        ]
        total = sum(whole)
        if not total > 0.0:
            return found, self.priors.spread()
        # What is unknown of parts of one stage is the same: their sigmas add up.
        return found, sum(t * p.sigma for t, p in zip(whole, found, strict=True)) / total

    # -- inside -----------------------------------------------------------------------------

    def _survey(self, rows: Sequence[Row]) -> None:
        self._columns = sorted({c for row in rows for c in row.seconds})
        self._index = {c: i for i, c in enumerate(self._columns)}
        traits = np.array([row.traits for row in rows])
        self._scale = _Scale.of(traits)
        self._points = _inducing(self._scale(traits), _MOST_INDUCING)
        self._set_length(self.priors.length)

    def _set_length(self, length: float) -> None:
        m = len(self._points)
        gram = _kernel(self._points, self._points, length) + 1e-6 * np.eye(m)
        self._root = np.linalg.inv(np.linalg.cholesky(gram))

    def _design(self, rows: Sequence[Row]) -> _Design:
        assert self._scale is not None
        seconds = np.zeros((len(rows), len(self._columns)))
        unknown = np.zeros(len(rows))
        for i, row in enumerate(rows):
            for column, value in row.seconds.items():
                at = self._index.get(column)
                if at is None:
                    unknown[i] += value
                else:
                    seconds[i, at] = value
        traits = self._scale(np.array([row.traits for row in rows]))
        smooth = _kernel(traits, self._points, self.priors.length) @ self._root.T
        missing = np.clip(1.0 - (smooth**2).sum(1), 0.0, 1.0)
        # A trait far outside of what was seen says no more than one at the edge.
        return _Design(seconds, np.clip(traits, -3.0, 3.0), smooth, missing, unknown)

    def _precision(self) -> Array:
        p, h, m = len(self._columns), len(self._scale.mean), len(self._points)  # type: ignore[union-attr]
        found = np.zeros((p + h + m, p + h + m))
        found[:p, :p] = np.linalg.inv(_prior_covariance(self._columns, self.priors))
        found[p : p + h, p : p + h] = np.eye(h) / self.priors.trait**2
        found[p + h :, p + h :] = np.eye(m) / max(self.priors.smooth, 1e-3) ** 2
        return found

    def _linear(self, design: _Design, mean: Array) -> tuple[Array, Array]:
        """Value and Jacobian of the predicted logarithms."""
        p = design.seconds.shape[1]
        scaled = design.seconds * np.exp(mean[:p])
        whole = scaled.sum(1) + design.unknown
        jacobian = np.hstack([scaled / whole[:, None], design.traits, design.smooth])
        value = np.log(whole) + jacobian[:, p:] @ mean[p:]
        return value, jacobian

    def _noise(self, design: _Design) -> Array:
        return self.priors.noise**2 + self.priors.smooth**2 * design.missing

    def _solve(
        self, design: _Design, measured: Array, weights: Array
    ) -> tuple[Array, Array, Array]:
        """Finds the posterior; returns (values, Jacobian, weights over noise) at it."""
        prior = self._precision()
        noise = self._noise(design)
        mean = np.zeros(len(prior))
        for _ in range(_STEPS):
            value, jacobian = self._linear(design, mean)
            left = measured - value
            robust = (_DEGREES + 1.0) / (_DEGREES + left**2 / noise)
            inverse = weights * robust / noise
            normal = prior + jacobian.T @ (jacobian * inverse[:, None])
            step = np.linalg.solve(normal, jacobian.T @ (inverse * (left + jacobian @ mean)))
            mean = np.clip(step, -3.0, 3.0)
        value, jacobian = self._linear(design, mean)
        self._mean, self._covariance = mean, np.linalg.inv(normal)
        return value, jacobian, inverse

    def _left_out(
        self, design: _Design, measured: Array, weights: Array, groups: Sequence[str]
    ) -> tuple[Array, Array]:
        """(error of the logarithm, its variance) of every row as if its group had not been seen."""
        value, jacobian, inverse = self._solve(design, measured, weights)
        normal = np.linalg.inv(self._covariance)
        names = np.array(groups)
        error, variance = np.zeros(len(measured)), np.zeros(len(measured))
        target = inverse * (measured - value + jacobian @ self._mean)
        whole = jacobian.T @ target
        for name in sorted(set(groups)):
            at = names == name
            own = jacobian[at]
            reduced = normal - own.T @ (own * inverse[at, None])
            mean = np.linalg.solve(reduced, whole - own.T @ target[at])
            error[at] = measured[at] - value[at] - own @ (mean - self._mean)
            spread = np.linalg.solve(reduced, own.T)
            variance[at] = (own * spread.T).sum(1)
        return error, np.maximum(variance, 0.0) + self._noise(design)

    def _choose(
        self, rows: Sequence[Row], measured: Array, weights: Array, groups: Sequence[str]
    ) -> None:
        best = -math.inf
        chosen = self.priors
        for candidate in CANDIDATES:
            self.priors = candidate
            self._set_length(candidate.length)
            error, variance = self._left_out(self._design(rows), measured, weights, groups)
            # Student's t, so that one group of its own does not decide.
            density = -0.5 * np.log(variance) - 0.5 * (_DEGREES + 1) * np.log1p(
                error**2 / variance / _DEGREES
            )
            if (score := float(density.mean())) > best:
                best, chosen = score, candidate
        self.priors = chosen
        self._set_length(chosen.length)

    def _calibrate(
        self, design: _Design, measured: Array, weights: Array, groups: Sequence[str]
    ) -> None:
        mean, covariance = self._mean, self._covariance
        error, variance = self._left_out(design, measured, weights, groups)
        reach = float(np.quantile(np.abs(error) / np.sqrt(variance), 0.8)) / _Z80
        trust = len(set(groups)) / (len(set(groups)) + 2.0)
        self.calibrated = float(np.clip(math.exp(trust * math.log(max(reach, 1e-3))), 0.5, 3.0))
        self._mean, self._covariance = mean, covariance

    def _one(self, row: Row) -> Predicted:
        whole = sum(row.seconds.values())
        wide = self.priors.spread()
        if not self.fitted or not whole > 0.0 or not math.isfinite(whole):
            return Predicted(0.0, wide)
        design = self._design([row])
        value, jacobian = self._linear(design, self._mean)
        variance = float((jacobian @ self._covariance @ jacobian.T)[0, 0])
        unknown = float(design.unknown[0]) / whole
        variance += float(self._noise(design)[0]) + (wide * unknown) ** 2
        log = float(value[0]) - math.log(whole)
        return Predicted(min(max(log, -3.0), 3.0), self.calibrated * math.sqrt(variance))


def _usable(row: Row) -> bool:
    whole = sum(row.seconds.values())
    return 0.0 < row.measured < math.inf and 0.0 < whole < math.inf


def _grouped(names: Sequence[str]) -> list[str]:
    """At most `_GROUPS` groups: beyond that, several names share one."""
    known = {name: i % _GROUPS for i, name in enumerate(dict.fromkeys(names))}
    return [str(known[name]) for name in names]
