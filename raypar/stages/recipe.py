"""What decides the numbers of a training besides model, data, optimizer and seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from raypar.errors import ConfigError

SchedulerFn = Callable[[torch.optim.Optimizer], Any]
"""Makes a ``torch.optim.lr_scheduler`` for one rank's optimizer; called on every rank."""


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16: the rule, and the names, of `torch.amp.GradScaler`.

    The loss is multiplied with a scale before backward, so that small gradients survive float16,
    and gradients are divided by it before they are clipped and applied. A step whose gradients are
    not finite is skipped on every rank.

    Args:
        init_scale: Scale of the first step.
        growth_factor: What the scale is multiplied with after `growth_interval` good steps.
        backoff_factor: What it is multiplied with after a step that was skipped.
        growth_interval: Good steps in a row before it grows.
        max_skips: A step that would be the next one skipped after so many in a row ends the run.

    Raises:
        ConfigError: A value is out of range.
    """

    init_scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    max_skips: int = 25

    def __post_init__(self) -> None:
        _check("loss_scale.init_scale", self.init_scale, self.init_scale > 0, "above 0", 65536.0)
        grows, shrinks = self.growth_factor, self.backoff_factor
        _check("loss_scale.growth_factor", grows, grows > 1, "above 1", 2.0)
        _check("loss_scale.backoff_factor", shrinks, 0 < shrinks < 1, "between 0 and 1", 0.5)
        for name, value in (("growth_interval", 2000), ("max_skips", 25)):
            number = getattr(self, name)
            _check(f"loss_scale.{name}", number, number >= 1, "at least 1", value)


@dataclass(frozen=True)
class Recipe:
    """The options of a training that decide its numbers, equal on every rank.

    Args:
        clip_norm: Limit of the global gradient norm, as `torch.nn.utils.clip_grad_norm_` has it.
        scheduler: Makes the learning-rate scheduler; stepped once for every applied step.
            ``ReduceLROnPlateau`` is given the step's global loss.
        ema_decay: Decay of an exponential moving average of the weights, updated after every
            applied step as ``torch.optim.swa_utils.AveragedModel`` does with
            ``get_ema_multi_avg_fn``: the first update copies, and buffers follow the model's.
        loss_scale: How the loss is scaled for float16. Without it, a step that is not finite is an
            error.

    Raises:
        ConfigError: A value is out of range.
    """

    clip_norm: float | None = None
    scheduler: SchedulerFn | None = None
    ema_decay: float | None = None
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, self.clip_norm > 0, "above 0, or None", 1.0)
        if self.ema_decay is not None:
            _check(
                "ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "in [0, 1), or None", 0.999
            )
        if self.scheduler is not None and not callable(self.scheduler):
            raise ConfigError(
                f"scheduler is {self.scheduler!r}; every rank needs its own: pass a callable that "
                "builds it from the optimizer, for example "
                "lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)"
            )


def _check(name: str, value: Any, holds: bool, wanted: str, example: float) -> None:
    if not (holds and math.isfinite(value)):
        raise ConfigError(f"{name} is {value!r}; give a value {wanted}, for example {example}")
