"""Other regressors for the learned cost model, on the same rows: what the choice rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from raypar.search.cost.features import analytic_s
from raypar.search.cost.regression import Row, WorkRegression

Array = Any


class Guess(NamedTuple):
    """Logarithms of the factor on the analytic seconds, and their sigmas."""

    log: Array
    sigma: Array


Rival = Callable[[Sequence[Row], Sequence[Row]], Guess]
"""(rows to learn from, rows to predict) → what it says of the latter."""


def _analytic(rows: Sequence[Row]) -> Array:
    return np.array([analytic_s(row.seconds) for row in rows])


def _ratios(rows: Sequence[Row]) -> Array:
    return np.log([row.measured for row in rows]) - np.log(_analytic(rows))


class _Features:
    """Traits and shares of classes of whole stages, with mean 0 and spread 1."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._kinds = sorted({c[:3] for row in rows for c in row.seconds})
        raw = self._raw(rows)
        self._mean, spread = raw.mean(0), raw.std(0)
        self._spread = np.where(spread > 1e-6, spread, 1.0)

    def _raw(self, rows: Sequence[Row]) -> Array:
        found = np.zeros((len(rows), len(self._kinds)))
        index = {kind: i for i, kind in enumerate(self._kinds)}
        for i, row in enumerate(rows):
            whole = analytic_s(row.seconds)
            for column, seconds in row.seconds.items():
                if column[:3] in index:
                    found[i, index[column[:3]]] += seconds / whole
        return np.hstack([np.array([row.traits for row in rows]), np.sqrt(found)])

    def __call__(self, rows: Sequence[Row]) -> Array:
        return np.clip((self._raw(rows) - self._mean) / self._spread, -4.0, 4.0)


def _gaussian_process(x: Array, y: Array, to: Array) -> Guess:
    """Prior mean 0; length, spread and noise by marginal likelihood on a grid."""

    def kernel(a: Array, b: Array, length: float) -> Array:
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.exp(-0.5 * squared / length**2)

    best: tuple[float, Guess] | None = None
    for length in (2.0, 4.0, 8.0):
        gram, cross = kernel(x, x, length), kernel(to, x, length)
        for spread in (0.1, 0.2, 0.4):
            for noise in (0.03, 0.06, 0.12):
                full = spread**2 * gram + noise**2 * np.eye(len(x))
                factor = np.linalg.cholesky(full)
                mean = np.linalg.solve(full, y)
                score = float(-0.5 * y @ mean - np.log(np.diag(factor)).sum())
                if best is None or score > best[0]:
                    half = np.linalg.solve(factor, spread**2 * cross.T)
                    variance = spread**2 + noise**2 - (half**2).sum(0)
                    own = Guess(spread**2 * cross @ mean, np.sqrt(np.maximum(variance, 1e-6)))
                    best = score, own
    assert best is not None
    return best[1]


def whole_stage_process(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """A Gaussian process over features of whole stages."""
    features = _Features(train)
    return _gaussian_process(features(train), _ratios(train), features(test))


def _class_seconds(rows: Sequence[Row], kinds: Sequence[tuple[str, ...]]) -> Array:
    index = {kind: i for i, kind in enumerate(kinds)}
    found = np.zeros((len(rows), len(kinds) + 1))
    for i, row in enumerate(rows):
        for column, seconds in row.seconds.items():
            found[i, index.get(column[:3], len(kinds))] += seconds
    return found


def class_least_squares(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """Non-negative coefficients of classes, drawn a little to 1; a Gaussian process on the rest."""
    from scipy.optimize import nnls

    kinds = sorted({c[:3] for row in train for c in row.seconds})
    measured = np.array([row.measured for row in train])
    table = _class_seconds(train, kinds)[:, :-1] / measured[:, None]
    pull = 0.1 * math.sqrt(len(train) / len(kinds)) * np.eye(len(kinds))
    found, _ = nnls(np.vstack([table, pull]), np.concatenate([np.ones(len(train)), np.diag(pull)]))
    factors = np.append(found, 1.0)

    def log(rows: Sequence[Row]) -> Array:
        fitted = np.maximum(_class_seconds(rows, kinds) @ factors, 1e-3 * _analytic(rows))
        return np.log(fitted) - np.log(_analytic(rows))

    features = _Features(train)
    rest = _gaussian_process(features(train), _ratios(train) - log(train), features(test))
    return Guess(log(test) + rest.log, rest.sigma)


def sklearn_process(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """scikit-learn's Gaussian process, its kernel fitted by gradients."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    features = _Features(train)
    kernel = ConstantKernel(0.04, (1e-3, 1.0)) * RBF(4.0, (0.5, 30.0)) + WhiteKernel(
        0.003, (1e-4, 0.1)
    )
    model = GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=0)
    model.fit(features(train), _ratios(train))
    mean, sigma = model.predict(features(test), return_std=True)
    return Guess(mean, sigma)


def boosting(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """scikit-learn's gradient boosting, with quantiles for its sigma."""
    from sklearn.ensemble import GradientBoostingRegressor

    features = _Features(train)
    x, y, to = features(train), _ratios(train), features(test)
    options: dict[str, Any] = {
        "n_estimators": 120, "max_depth": 3, "learning_rate": 0.06, "subsample": 0.7,
        "random_state": 0,
    }  # fmt: skip
    middle = GradientBoostingRegressor(loss="huber", **options).fit(x, y).predict(to)
    low, high = (
        GradientBoostingRegressor(loss="quantile", alpha=a, **options).fit(x, y).predict(to)
        for a in (0.1, 0.9)
    )
    return Guess(middle, np.maximum(high - low, 0.02) / 2.563)


def ensemble(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """Eight small networks in torch, each trained on a resampling of the rows."""
    features = _Features(train)
    x = torch.tensor(features(train), dtype=torch.float32)
    y = torch.tensor(_ratios(train), dtype=torch.float32)
    to = torch.tensor(features(test), dtype=torch.float32)
    found, noise = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(x.shape[1], 24), nn.Tanh(), nn.Linear(24, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        own = torch.randint(0, len(x), (len(x),))
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.huber_loss(model(x[own])[:, 0], y[own], delta=0.1)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            found.append(model(to)[:, 0].numpy())
            noise.append(float((model(x)[:, 0] - y).abs().median()))
    every = np.array(found)
    return Guess(every.mean(0), np.sqrt(every.var(0) + (1.5 * np.median(noise)) ** 2))


def class_and_size_factors(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """raypar's own: Bayesian factors for classes and sizes of ops."""
    model = WorkRegression()
    model.fit(train)
    found = model.predict(test)
    return Guess(np.array([p.log for p in found]), np.array([p.sigma for p in found]))


def nothing(train: Sequence[Row], test: Sequence[Row]) -> Guess:
    """The calibrated analytic model, as far off everywhere as it was on the others."""
    spread = math.sqrt(float((_ratios(train) ** 2).mean()))
    return Guess(np.zeros(len(test)), np.full(len(test), spread))


RIVALS: dict[str, Rival] = {
    "analytic": nothing,
    "learned: factors of classes and sizes": class_and_size_factors,
    "least squares of classes + process": class_least_squares,
    "process over stages": whole_stage_process,
    "scikit-learn process over stages": sklearn_process,
    "scikit-learn gradient boosting": boosting,
    "torch ensemble": ensemble,
}
