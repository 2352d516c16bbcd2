"""All that a trainer was asked for, checked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from raypar.comm.network import NetworkSettings
from raypar.errors import ConfigError, did_you_mean
from raypar.graph.autocast import under_autocast
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.stages.engines import ENGINES
from raypar.stages.recipe import LossScale, Recipe, SchedulerFn
from raypar.stages.spec import Engine, OptimizerFn
from raypar.train._kinds import NONE, NUMBER, check_kinds
from raypar.train.checkpoint import Checkpoint
from raypar.train.config import RunConfig, ScalingConfig
from raypar.train.data import Data
from raypar.train.loop import EarlyStop, Limits

if TYPE_CHECKING:
    from raypar.mesh.bundles import BundleRange


STEP_METRICS = ("loss", "grad_norm", "step_s")
"""What a checkpoint keeps of the metrics of its last step."""

_PLACES = (Checkpoint, str, Path, NONE)
_KINDS = {
    "model_fn": (Callable, "a function without arguments that builds a torch.nn.Module"),
    "loss_fn": ((Callable, NONE), "a function of the module's output (and batch), or None"),
    "plan": ((Plan, str, Path), "'auto', a raypar.Plan, or the path of a plan file"),
    "seed": (int, "a whole number of at least 0"),
    "time_limit_s": ((NUMBER, NONE), "seconds above 0, for example 3600, or None"),
    "clip_norm": ((NUMBER, NONE), "a number above 0, for example 1.0, or None"),
    "ema_decay": ((NUMBER, NONE), "a number in [0, 1), for example 0.999, or None"),
    "precision": ((str, NONE), "'bf16', 'fp16', or None"),
    "loss_scale": ((LossScale, NONE), "raypar.LossScale(...), or None"),
    "accumulate": (int, "a number of batches, at least 1"),
    "eval_data": (
        (Iterable, Callable, NONE),
        "batches that can be gone through again (a list, a "
        "DataLoader, raypar.batches(...)), or a callable that returns them",
    ),
    "eval_every": ((int, NONE), "steps, at least 1, or None"),
    "eval_metrics": (Mapping, "a dict of functions, for example {'accuracy': accuracy}"),
    "early_stop": ((EarlyStop, NONE), "raypar.EarlyStop(...), or None"),
    "resume_from": (_PLACES, "'auto', a raypar.Checkpoint, the path of one or of a run"),
    "init_from": (_PLACES, "a raypar.Checkpoint, or the path of a file or folder of weights"),
    "network": ((NetworkSettings, NONE), "raypar.NetworkSettings(...), or None"),
    "on_plan": ((Callable, NONE), "a function of plan, graph and cluster, or None"),
    "config": (Mapping, "a dict, or None"),
}
"""Field → what it may be, and the same in words."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `raypar.Trainer` was given; its arguments are explained there.

    Attributes:
        renew_options: Whether a resume takes the optimizer's options (learning rate, weight decay,
            ...) from this run and not from the checkpoint; see
            `raypar.stages.update.Update.renew_options`.
        lent: Bundles of somebody else's placement group to run on, instead of groups of its own.

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
    scheduler: SchedulerFn | None = None
    precision: Literal["bf16", "fp16"] | None = None
    loss_scale: LossScale | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    engine: Engine = "eager"
    eval_data: Data | None = None
    eval_every: int | None = None
    eval_metrics: Mapping[str, Any] = field(default_factory=dict)
    eval_weights: Literal["live", "ema"] = "live"
    early_stop: EarlyStop | None = None
    resume_from: str | Path | Checkpoint | None = None
    init_from: str | Path | Checkpoint | None = None
    network: NetworkSettings | None = None
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    search: Any = None
    batch_dims: Any = None
    on_plan: Callable[[Plan, OpGraph, Cluster], None] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    renew_options: bool = False
    lent: BundleRange | None = None

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_limits()
        self._check_engine()
        if self.loss_scale is not None and self.precision != "fp16":
            raise ConfigError(
                f"loss_scale is given, but precision is {self.precision!r}: it keeps small float16 "
                'gradients; set precision="fp16", or leave it out'
            )
        assert self.recipe and self.model_and_loss  # both check their values
        if self.accumulate < 1:
            raise ConfigError(
                f"accumulate is {self.accumulate!r}; give a number of batches, at least 1"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"seed is {self.seed!r}; give a whole number of at least 0, below 2**63"
            )
        if self.eval_every is not None and self.eval_every < 1:
            raise ConfigError(f"eval_every is {self.eval_every!r}; give steps, at least 1")
        if self.eval_every is not None and self.eval_data is None:
            raise ConfigError("eval_every is given without eval_data: there is nothing to evaluate")
        if self.eval_every is not None and isinstance(self.eval_data, Iterator):
            raise ConfigError(
                f"eval_data is a {type(self.eval_data).__name__}, which can be gone through only "
                f"once, and eval_every={self.eval_every} evaluates again and again: pass a list, a "
                "DataLoader, raypar.batches(...), or a callable that returns the iterator"
            )
        if self.eval_data is None and (self.eval_metrics or self.eval_weights != "live"):
            raise ConfigError(
                "eval_metrics or eval_weights is given without eval_data: there is nothing to "
                "evaluate"
            )
        if self.eval_weights not in ("live", "ema"):
            raise ConfigError(f"eval_weights is {self.eval_weights!r}; give 'live' or 'ema'")
        if self.eval_weights == "ema" and self.ema_decay is None:
            raise ConfigError(
                "eval_weights='ema' needs an average of the weights: set ema_decay, for example "
                "0.999"
            )
        if self.early_stop is not None and self.eval_data is None:
            raise ConfigError(
                "early_stop looks at evaluations: give eval_data and eval_every, for example 50"
            )
        self._check_metrics()

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(
                f"engine is {self.engine!r}; give {', '.join(map(repr, ENGINES))}."
                f"{did_you_mean(str(self.engine), ENGINES)}"
            )
        if self.engine == "cuda_graph" and not self.scaling.use_gpu:
            raise ConfigError(
                "engine is 'cuda_graph', and the devices are CPUs, which have no CUDA graphs: set "
                "ScalingConfig(use_gpu=True), or engine='eager' (or 'compiled')"
            )

    def _check_kinds(self) -> None:
        check_kinds("", self, _KINDS)
        for name, kind in (("scaling", ScalingConfig), ("run", RunConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise ConfigError(
                    f"{name}_config is {value!r}; give raypar.{kind.__name__}(...), or None"
                )
        if self.search is not None and not hasattr(self.search, "chosen_planner"):
            raise ConfigError(
                f"search_config is {self.search!r}; give raypar.SearchConfig(...), or None"
            )

    def _check_metrics(self) -> None:
        """A metric that nothing measures would be waited for in vain."""
        own = (
            ("loss", "samples", "batches", *self.eval_metrics) if self.eval_data is not None else ()
        )
        evaluated = [f"eval_{name}" for name in own]
        if self.early_stop is not None and self.early_stop.metric not in evaluated:
            raise ConfigError(
                f"early_stop.metric is {self.early_stop.metric!r}; evaluations give "
                f"{', '.join(evaluated)}"
            )
        score, known = self.run.checkpoint_config.score_attribute, [*STEP_METRICS, *evaluated]
        if score is not None and score not in known:
            raise ConfigError(
                f"CheckpointConfig.score_attribute (checkpoint.best_of) is {score!r}; a checkpoint "
                f"of this run has {', '.join(known)}"
                + ("" if evaluated else "; give eval_data for those of evaluations")
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
    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run beside tensors, plan and state."""
        return {"config": dict(self.config), "seed": self.seed, "precision": self.precision}

    @property
    def recipe(self) -> Recipe:
        """The options that decide numbers, as ranks get them."""
        scale = self.loss_scale
        if self.precision == "fp16" and scale is None:
            scale = LossScale()
        return Recipe(
            clip_norm=self.clip_norm,
            scheduler=self.scheduler,
            ema_decay=self.ema_decay,
            loss_scale=scale,
        )

    @property
    def model_and_loss(self) -> tuple[Any, Any]:
        """Model and loss function as they are captured, under autocast where asked for."""
        if self.precision is None:
            return self.model_fn, self.loss_fn
        return under_autocast(self.model_fn, self.loss_fn, self.precision)

    def limits(self, steps: int | None) -> Limits:
        """When a run of so many steps (None: until the data end) ends, and what is due."""
        checkpoint = self.run.checkpoint_config
        return Limits(
            steps=sys.maxsize if steps is None else steps,
            time_limit_s=self.time_limit_s,
            checkpoint_steps=checkpoint.every_steps,
            checkpoint_s=checkpoint.every_s,
            checkpoint_at_end=checkpoint.at_end,
            evaluate=self.eval_data is not None,
            evaluate_steps=self.eval_every,
            early_stop=self.early_stop,
        )
