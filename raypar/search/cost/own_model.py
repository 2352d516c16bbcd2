"""What one model's own stages add to what was learned from all models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raypar.search.cost.features import Counts
from raypar.search.cost.work import Work

Programs = tuple[tuple[Work, Counts], ...]

_MODEL, _PROGRAM, _NOISE = 0.3, 0.15, 0.05
"""Standard deviations of logarithms: of what all stages of a model share, of what is a stage's own,
and of one measurement. A model may be off by much that its stages, made of like layers, share."""


class Residual(NamedTuple):
    """How far a measured stage was from what was predicted of it.

    Attributes:
        programs: What it runs.
        log: Logarithm of measured over predicted seconds.
        times: How often it was measured.
    """

    programs: Programs
    log: float
    times: int = 1


class OwnModel:
    """A factor on the predicted seconds of every stage of one model.

    A Gaussian process with two parts: a level that the model's stages share, and one for equal
    programs. What a program was measured at is nearly what is predicted of it, and its siblings
    follow it part of the way.
    """

    def __init__(self, residuals: Sequence[Residual] = ()) -> None:
        """Learns from what was measured of the model."""
        self._seen = [residual.programs for residual in residuals]
        self._weights = np.zeros(0)
        if residuals:
            noise = np.diag([_NOISE**2 / residual.times for residual in residuals])
            gram = np.array([self._shared(programs) for programs in self._seen]) + noise
            self._weights = np.linalg.solve(gram, [residual.log for residual in residuals])

    def log_factor(self, programs: Programs) -> float:
        """Logarithm of the factor on what is predicted of a stage; 0 where nothing is known."""
        if not self._seen:
            return 0.0
        return float(np.dot(self._shared(programs), self._weights))

    def _shared(self, programs: Programs) -> list[float]:
        return [_MODEL**2 + (_PROGRAM**2 if programs == other else 0.0) for other in self._seen]
