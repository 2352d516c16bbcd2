"""Sweeps over training runs: Ray Tune's trials, and Optuna studies of models and plans at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypar.tune.joint import JointStudy, joint_study
    from raypar.tune.sweep import trainable

__all__ = ["JointStudy", "joint_study", "trainable"]

_HOMES = {
    "JointStudy": "raypar.tune.joint",
    "joint_study": "raypar.tune.joint",
    "trainable": "raypar.tune.sweep",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'raypar.tune' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
