"""Sweeps over training runs: Ray Tune's trials, and Optuna studies of models and plans at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raypar._lazy import lazy

if TYPE_CHECKING:
    from raypar.tune.joint import JointStudy, joint_study
    from raypar.tune.sweep import trainable

__all__ = ["JointStudy", "joint_study", "trainable"]

__getattr__ = lazy(
    __name__,
    {
        "JointStudy": "raypar.tune.joint",
        "joint_study": "raypar.tune.joint",
        "trainable": "raypar.tune.sweep",
    },
)
