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

How much may vary is given, not fitted: errors on models not seen hardly depend on it, and few
models are in a store. Sigmas are scaled by how well groups of rows (stages of one model) left out
are predicted, until as many errors are within them as they say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from raypar.search.cost.features import EXTRA, Column, analytic_s
from raypar.search.cost.profiled import one_thread

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
        loose: How many times as much calls and extra columns may vary: analytic models know least
            of them, and they are small.
        size: Of what differs between sizes of a kind.
        trait: Of the effect of one unit of a trait.
        smooth: Of the smooth remainder.
        group: Of what all rows of a group share and no other has.
        length: Distance, in standard deviations of the traits, over which the remainder varies.
        noise: Of one measurement.
    """

    common: float = 0.1
    family: float = 0.05
    kind: float = 0.1
    loose: float = 3.0
    size: float = 0.08
    trait: float = 0.05
    smooth: float = 0.12
    group: float = 0.1
    length: float = 2.0
    noise: float = 0.1

    def spread(self) -> float:
        """Of one column's factor in all: how wrong the analytic model may be about it."""
        return math.sqrt(
            self.common**2 + self.family**2 + self.kind**2 + self.size**2 + self.group**2
        )


@dataclass
class _Scale:
    """Brings traits to mean 0 and spread 1; those that never vary stay as they are."""

    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, traits: Tensor) -> _Scale:
        spread = traits.std(0, correction=0)
        return cls(traits.mean(0), torch.where(spread > 1e-6, spread, 1.0))

    def __call__(self, traits: Tensor) -> Tensor:
        return (traits - self.mean) / self.spread


def _inducing(points: Tensor, most: int) -> Tensor:
    """Up to `most` of the points, each as far from those before as can be (Gonzalez 1985)."""
    chosen = [0]
    far = ((points - points[0]) ** 2).sum(1)
    while len(chosen) < min(most, len(points)):
        at = int(far.argmax())
        if far[at] < 1e-3:
            break
        chosen.append(at)
        far = torch.minimum(far, ((points - points[at]) ** 2).sum(1))
    return points[chosen]


def _kernel(a: Tensor, b: Tensor, length: float) -> Tensor:
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2.0 * a @ b.T
    return torch.exp(-0.5 * squared.clamp(min=0.0) / length**2)


def _prior_covariance(columns: Sequence[Column], priors: Priors) -> Tensor:
    """Covariance of the columns' factors."""
    common = _same([c.device for c in columns])
    family = _same([c[:2] for c in columns])
    kind = _same([c[:3] for c in columns])
    place = _vector([[c.size, c.density] for c in columns])
    near = torch.exp(-0.5 * ((place[:, None] - place[None]) ** 2).sum(-1))
    found = priors.common**2 * common
    loose = _vector([priors.loose if c.family in ("call", EXTRA) else 1.0 for c in columns])
    loose = loose[:, None] * loose[None]
    found = found + priors.family**2 * loose * family
    found = found + kind * (priors.kind**2 * loose + priors.size**2 * near)
    return found + 1e-9 * torch.eye(len(columns), dtype=torch.float64)


def _same(names: Sequence[object]) -> Tensor:
    """1 where two are equal, else 0."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    own = _vector([numbers[name] for name in names])
    return (own[:, None] == own[None]).double()


def _vector(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass
class _Design:
    """What rows look like to the linear algebra.

    Attributes:
        seconds: [rows, columns].
        rest: [rows, traits + inducing points + groups] what acts on the logarithm linearly.
        missing: [rows] share of the remainder's variance that the inducing points do not explain.
        extra: [rows] seconds that the analytic model does not count.
        unknown: [rows] seconds in columns that were not there when it was fitted.
    """

    seconds: Tensor
    rest: Tensor
    missing: Tensor
    extra: Tensor
    unknown: Tensor


class _Posterior(NamedTuple):
    """What is known after a fit: the unknowns, and the equations around them.

    Attributes:
        mean: [unknowns].
        normal: [unknowns, unknowns] inverse covariance.
        value: [rows] predicted logarithms.
        jacobian: [rows, unknowns].
        inverse: [rows] one over the variance of each measurement.
    """

    mean: Tensor
    normal: Tensor
    value: Tensor
    jacobian: Tensor
    inverse: Tensor


class Predicted(NamedTuple):
    """A time and how sure it is.

    Attributes:
        log: Logarithm of the factor on the analytic seconds.
        sigma: Standard deviation of the logarithm of the time, measuring it included.
    """

    log: float
    sigma: float


class _Basis:
    """The unknowns of a fit: one per column, per trait, per inducing point, and per group."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.groups = list(dict.fromkeys(_grouped([row.group for row in rows])))
        self.columns = sorted({c for row in rows for c in row.seconds})
        self._index = {c: i for i, c in enumerate(self.columns)}
        traits = _vector([row.traits for row in rows])
        self._scale = _Scale.of(traits)
        self._points = _inducing(self._scale(traits), _MOST_INDUCING)

    def design(
        self, rows: Sequence[Row], length: float, groups: Sequence[int] | None = None
    ) -> _Design:
        """Rows as matrices; without `groups` they belong to none of those learned from."""
        seconds = torch.zeros(len(rows), len(self.columns), dtype=torch.float64)
        unknown = torch.zeros(len(rows), dtype=torch.float64)
        places: list[tuple[int, int]] = []
        values: list[float] = []
        for i, row in enumerate(rows):
            for column, value in row.seconds.items():
                at = self._index.get(column)
                if at is None:
                    unknown[i] += value if column.family != EXTRA else 0.0
                else:
                    places.append((i, at))
                    values.append(value)
        if places:
            seconds[tuple(torch.tensor(places).T)] = _vector(values)
        traits = self._scale(_vector([row.traits for row in rows]))
        gram = _kernel(self._points, self._points, length)
        factor = torch.linalg.cholesky(gram + 1e-6 * torch.eye(len(gram), dtype=torch.float64))
        to_points = _kernel(traits, self._points, length)
        smooth = torch.linalg.solve_triangular(factor, to_points.T, upper=False).T
        missing = (1.0 - (smooth**2).sum(1)).clamp(0.0, 1.0)
        # A trait far outside of what was seen says no more than one at the edge.
        extra = seconds @ _vector([float(c.family == EXTRA) for c in self.columns])
        member = torch.zeros(len(rows), len(self.groups), dtype=torch.float64)
        if groups is not None:
            member = (_vector(groups)[:, None] == _vector(self.groups)[None]).double()
        rest = torch.cat([traits.clamp(-3.0, 3.0), smooth, member], 1)
        return _Design(seconds, rest, missing, extra, unknown)

    def precision(self, priors: Priors) -> Tensor:
        """Inverse covariance of the unknowns before anything was measured."""
        factors = torch.linalg.inv(_prior_covariance(self.columns, priors))
        traits = torch.full_like(self._scale.mean, priors.trait**-2)
        smooth = torch.full_like(self._points[:, 0], max(priors.smooth, 1e-3) ** -2)
        groups = torch.full((len(self.groups),), priors.group**-2, dtype=torch.float64)
        return torch.block_diag(factors, torch.diag(torch.cat([traits, smooth, groups])))


class WorkRegression:
    """The regression; see the module.

    Attributes:
        priors: How much may vary.
        calibrated: By how much sigmas were scaled after looking at groups left out.
    """

    def __init__(self, priors: Priors | None = None) -> None:
        """Knows nothing yet."""
        self.priors = priors or Priors()
        self.calibrated = 1.0
        self._basis: _Basis | None = None
        self._mean = self._covariance = torch.zeros(0)

    @property
    def fitted(self) -> bool:
        """Whether it has seen any row."""
        return self._basis is not None

    def fit(self, rows: Sequence[Row], *, calibrate: bool = True) -> None:
        """Learns from rows, forgetting what it knew.

        Args:
            rows: Measurements; those without a positive, finite time or prediction are skipped.
            calibrate: Whether sigmas are compared anew with what is left out; a refit after few
                more rows keeps what that said.
        """
        kept = [row for row in rows if _usable(row)]
        if not kept:
            self._basis = None
            return
        with one_thread():
            data = _Data(kept)
            posterior = _solve(data, self.priors)
            if calibrate and len(set(data.groups)) > 2:
                self.calibrated = _reach(data, self.priors)
            self._basis = data.basis
            self._mean, self._covariance = posterior.mean, torch.linalg.inv(posterior.normal)

    def predict(self, rows: Sequence[Row]) -> list[Predicted]:
        """What rows take; their `measured` does not count."""
        wide = self.priors.spread()
        whole = [analytic_s(row.seconds) for row in rows]
        if self._basis is None or not rows:
            return [Predicted(0.0, wide) for _ in rows]
        with one_thread():
            design = self._basis.design(rows, self.priors.length)
            value, jacobian = _linear(design, self._mean)
            variance = ((jacobian @ self._covariance) * jacobian).sum(1)
            unknown = design.unknown / _vector(whole).clamp(min=1e-300)
            variance = variance + _noise(design, self.priors) + (wide * unknown) ** 2
            variance = variance + self.priors.group**2
        return [
            Predicted(min(max(log - math.log(seconds), -3.0), 3.0), self.calibrated * math.sqrt(v))
            if 0.0 < seconds < math.inf
            else Predicted(0.0, wide)
            for log, v, seconds in zip(value.tolist(), variance.tolist(), whole, strict=True)
        ]


class _Data:
    """Rows to learn from, as tensors."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.basis = _Basis(rows)
        self.rows = rows
        self.measured = _vector([row.measured for row in rows]).log()
        self.weights = _vector([min(row.weight, 4.0) for row in rows])
        self.groups = _grouped([row.group for row in rows])
        self._designs: dict[float, _Design] = {}

    def design(self, length: float) -> _Design:
        """The rows' matrices, made once for each length."""
        if length not in self._designs:
            self._designs[length] = self.basis.design(self.rows, length, self.groups)
        return self._designs[length]


def _linear(design: _Design, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Value and Jacobian of the predicted logarithms."""
    p = design.seconds.shape[1]
    scaled = design.seconds * mean[:p].exp()
    # Extra columns add what their factors are over 1: with nothing learned that is nothing.
    every = scaled.sum(1) + design.unknown
    whole = torch.maximum(every - design.extra, 0.2 * every).clamp(min=1e-300)
    jacobian = torch.cat([scaled / whole[:, None], design.rest], 1)
    return whole.log() + jacobian[:, p:] @ mean[p:], jacobian


def _noise(design: _Design, priors: Priors) -> Tensor:
    return priors.noise**2 + priors.smooth**2 * design.missing


def _solve(data: _Data, priors: Priors) -> _Posterior:
    """The posterior, by Gauss–Newton steps from the prior's mean."""
    design = data.design(priors.length)
    prior = data.basis.precision(priors)
    noise = _noise(design, priors)
    mean = torch.zeros(len(prior), dtype=torch.float64)
    for step in range(_STEPS + 1):
        value, jacobian = _linear(design, mean)
        left = data.measured - value
        robust = (_DEGREES + 1.0) / (_DEGREES + left**2 / noise)
        inverse = data.weights * robust / noise
        normal = prior + jacobian.T @ (jacobian * inverse[:, None])
        if step == _STEPS:
            break
        wanted = jacobian.T @ (inverse * (left + jacobian @ mean))
        factor = torch.linalg.cholesky(normal)
        mean = torch.cholesky_solve(wanted[:, None], factor)[:, 0].clamp(-4.0, 4.0)
    return _Posterior(mean, normal, value, jacobian, inverse)


def _left_out(data: _Data, priors: Priors) -> tuple[Tensor, Tensor]:
    """(error of the logarithm, its variance) of every row as if its group had not been seen."""
    known = _solve(data, priors)
    error, variance = torch.zeros_like(data.measured), torch.zeros_like(data.measured)
    target = known.inverse * (data.measured - known.value + known.jacobian @ known.mean)
    whole = known.jacobian.T @ target
    for group in data.basis.groups:
        at = _vector([name == group for name in data.groups]).bool()
        own = known.jacobian[at]
        # The equations without the group's, solved for the mean and for each row's spread; what
        # only the group has keeps its prior, and so adds to the spread.
        reduced = known.normal - own.T @ (own * known.inverse[at, None])
        right = torch.cat([(whole - own.T @ target[at])[:, None], own.T], 1)
        found = torch.cholesky_solve(right, torch.linalg.cholesky(reduced))
        error[at] = data.measured[at] - known.value[at] - own @ (found[:, 0] - known.mean)
        variance[at] = (own * found[:, 1:].T).sum(1)
    return error, variance + _noise(data.design(priors.length), priors)


def _reach(data: _Data, priors: Priors) -> float:
    """By how much sigmas have to grow for 80 % of what was left out to be where they say."""
    error, variance = _left_out(data, priors)
    reach = float((error.abs() / variance.sqrt()).quantile(0.8)) / _Z80
    n = len(set(data.groups))
    return min(max(reach, 1e-3) ** (n / (n + 2.0)), 3.0) if reach > 0.5 else 0.5


def _usable(row: Row) -> bool:
    whole = analytic_s(row.seconds)
    return 0.0 < row.measured < math.inf and 0.0 < whole < math.inf


def _grouped(names: Sequence[str]) -> list[int]:
    """Numbers of the groups; at most `_GROUPS`: beyond that, several names share one."""
    known = {name: i % _GROUPS for i, name in enumerate(dict.fromkeys(names))}
    return [known[name] for name in names]
