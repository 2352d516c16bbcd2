"""Dynamic loss scaling, in step on all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from raypar.stages.recipe import LossScale


class LossScaler:
    """The scale of the loss over the steps.

    Every rank has its own and hears the same verdict on every step, so that all stay equal. The
    rule is that of ``torch.amp.GradScaler`` (Micikevicius et al., "Mixed Precision Training", 2018,
    section 3.2): the scale falls when a step overflows, and grows after a number of good ones.

    Args:
        rule: Its constants; None for a scale that is always 1.

    Attributes:
        scale: What the next step's loss is multiplied with.
        skips: Steps skipped in a row.
    """

    def __init__(self, rule: LossScale | None) -> None:
        self._rule = rule
        self._good = 0
        self._first_skipped = 1.0
        self.scale = 1.0 if rule is None else _rounded(rule.init_scale)
        self.skips = 0

    @property
    def inverse(self) -> float:
        """What gradients of that step are multiplied with; rounded as torch rounds it."""
        return _rounded(1.0 / self.scale)

    @property
    def active(self) -> bool:
        """Whether the loss is scaled at all."""
        return self._rule is not None

    def applied(self) -> None:
        """The step was finite."""
        if self._rule is None:
            return
        self.skips = 0
        self._good += 1
        if self._good >= self._rule.growth_interval:
            self._good = 0
            grown = _rounded(self.scale * self._rule.growth_factor)
            self.scale = grown if math.isfinite(grown) else self.scale

    def overflowed(self) -> bool:
        """The step was not finite.

        Returns:
            Whether it is to be skipped: never without a rule, nor after too many in a row.
        """
        if self._rule is None or self.skips >= self._rule.max_skips:
            return False
        if not self.skips:
            self._first_skipped = self.scale
        self._good = 0
        self.skips += 1
        self.scale = _rounded(self.scale * self._rule.backoff_factor)
        return True

    def story(self) -> str:
        """What led to a step that is not skipped any more, in words; empty without a rule."""
        if self._rule is None:
            return ""
        return (
            f" ({self.skips} steps before it were skipped in a row, while the loss scale fell from "
            f"{self._first_skipped:g} to {self.scale:g}, which no smaller scale will cure)"
        )

    def state(self) -> dict[str, Any] | None:
        """What a resume needs, as JSON values."""
        if self._rule is None:
            return None
        return {"scale": self.scale, "good_steps": self._good, "skips": self.skips}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state`."""
        self.scale = float(state["scale"])
        self._good, self.skips = int(state["good_steps"]), int(state["skips"])
        self._first_skipped = self.scale


def _rounded(scale: float) -> float:
    """As float32, in which torch keeps the scale."""
    return float(torch.tensor(scale, dtype=torch.float64).float())
