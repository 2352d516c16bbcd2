"""Loggers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from raypar.errors import ConfigError, did_you_mean
from raypar.train.loggers.base import Logger


def _tensorboard() -> Logger:
    from raypar.train.loggers.tensorboard import TensorBoardLogger

    return TensorBoardLogger()


def _mlflow() -> Logger:
    from raypar.train.loggers.mlflow import MLflowLogger

    return MLflowLogger()


def _wandb() -> Logger:
    from raypar.train.loggers.wandb import WandbLogger

    return WandbLogger()


def _ray() -> Logger:
    from raypar.train.loggers.ray_metrics import RayMetricsLogger

    return RayMetricsLogger()


LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "ray": _ray,
}
"""Name in ``run.loggers`` → what makes it."""


def make_loggers(names: Sequence[str]) -> list[Logger]:
    """The loggers of some names, in order.

    Raises:
        ConfigError: There is no such logger, one is named twice, or its package is missing.
    """
    found = []
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(
                f"run.loggers: there is no logger {name!r}; known are {', '.join(LOGGERS)}."
                f"{did_you_mean(name, LOGGERS)}"
            )
        if list(names).count(name) > 1:
            raise ConfigError(f"run.loggers names {name!r} twice: take one of them out")
        found.append(LOGGERS[name]())
    return found
