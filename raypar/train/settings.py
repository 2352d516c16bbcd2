"""All that a trainer was asked for, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from raypar.errors import ConfigError
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.stages.recipe import Recipe
from raypar.stages.spec import OptimizerFn
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import Data
from raypar.train.loop import EarlyStop, Limits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `raypar.Trainer` was given; its arguments are explained there.

    Raises:
        ConfigError: A value is out of range, or two of them contradict each other.
    """

    model_fn: Callable[[], torch.nn.Module]
    optimizer: OptimizerFn
    data: Data
    steps: int | None = None
    epochs: int | None = None
    time_limit_s: float | None = None
    loss_fn: Callable[..., torch.Tensor] | None = None
    plan: Plan | str | Path | Literal["auto"] = "auto"
    seed: int = 0
    clip_norm: float | None = None
    eval_data: Data | None = None
    eval_every: int | None = None
    early_stop: EarlyStop | None = None
    resume_from: str | Path | None = None
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    search: Any = None
    batch_dims: Any = None
    on_plan: Callable[[Plan, OpGraph, Cluster], None] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_limits()
        assert self.recipe  # checks its values
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; give a whole number of at least 0")
        if self.eval_every is not None and self.eval_every < 1:
            raise ConfigError(f"eval_every is {self.eval_every!r}; give steps, at least 1")
        if self.eval_every is not None and self.eval_data is None:
            raise ConfigError("eval_every is given without eval_data: there is nothing to evaluate")
        if self.early_stop is not None and self.eval_data is None:
            raise ConfigError(
                "early_stop looks at evaluations: give eval_data and eval_every, for example 50"
            )

    def _check_limits(self) -> None:
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(
                    f"{name} is {value!r}; give a number of at least 1, for example 100"
                )
        if self.steps is None and self.epochs is None:
            raise ConfigError("the run has no end: give steps, for example steps=100, or epochs=1")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"steps={self.steps} and epochs={self.epochs} both say when the run ends: give one"
            )
        if self.time_limit_s is not None and not self.time_limit_s > 0:
            raise ConfigError(f"time_limit_s is {self.time_limit_s!r}; give seconds above 0")

    @property
    def recipe(self) -> Recipe:
        """The options that decide numbers, as ranks get them."""
        return Recipe(clip_norm=self.clip_norm)

    def limits(self, steps: int) -> Limits:
        """When a run of so many steps ends, and what is due on its way."""
        checkpoint = self.run.checkpoint_config
        return Limits(
            steps=steps,
            time_limit_s=self.time_limit_s,
            checkpoint_steps=checkpoint.every_steps,
            checkpoint_s=checkpoint.every_s,
            checkpoint_at_end=checkpoint.at_end,
            evaluate_steps=None if self.eval_data is None else (self.eval_every or steps),
            early_stop=self.early_stop,
        )
