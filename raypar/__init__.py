"""raypar: pipeline- and data-parallel training of PyTorch models on Ray actors.

The public names, and nothing else. They are imported at first use, so that `import raypar` costs
neither torch nor Ray.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

import raypar.plan as _plan_module
from raypar._lazy import lazy
from raypar._version import __version__
from raypar.errors import (
    CaptureError,
    CheckpointError,
    ClusterError,
    CommAbortedError,
    CommError,
    CommTimeoutError,
    ConfigError,
    DataError,
    NonFiniteError,
    NothingFitsError,
    OptimizerError,
    PlanError,
    RayparError,
    ScheduleError,
    StageDiedError,
    TrainingError,
)
from raypar.plan import Plan

if TYPE_CHECKING:
    from raypar.comm.network import NetworkSettings
    from raypar.graph.capture import capture
    from raypar.graph.opgraph import OpGraph
    from raypar.mesh.cluster import Cluster
    from raypar.report.explain import explain
    from raypar.search.config import SearchConfig
    from raypar.search.plan import plan
    from raypar.stages.recipe import LossScale
    from raypar.train.callbacks import Callback
    from raypar.train.checkpoint import Checkpoint, CheckpointStore
    from raypar.train.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from raypar.train.data import PadTo, batches
    from raypar.train.loop import EarlyStop
    from raypar.train.result import Result
    from raypar.train.trainer import Trainer

__all__ = [
    "Callback",
    "CaptureError",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointStore",
    "Cluster",
    "ClusterError",
    "CommAbortedError",
    "CommError",
    "CommTimeoutError",
    "ConfigError",
    "DataError",
    "EarlyStop",
    "FailureConfig",
    "LossScale",
    "NetworkSettings",
    "NonFiniteError",
    "NothingFitsError",
    "OpGraph",
    "OptimizerError",
    "PadTo",
    "Plan",
    "PlanError",
    "RayparError",
    "Result",
    "RunConfig",
    "ScalingConfig",
    "ScheduleError",
    "SearchConfig",
    "StageDiedError",
    "Trainer",
    "TrainingError",
    "__version__",
    "batches",
    "capture",
    "explain",
    "plan",
]

__getattr__ = lazy(
    __name__,
    {
        "Callback": "raypar.train.callbacks",
        "Checkpoint": "raypar.train.checkpoint",
        "CheckpointConfig": "raypar.train.config",
        "CheckpointStore": "raypar.train.checkpoint",
        "EarlyStop": "raypar.train.loop",
        "FailureConfig": "raypar.train.config",
        "LossScale": "raypar.stages.recipe",
        "NetworkSettings": "raypar.comm.network",
        "PadTo": "raypar.train.data",
        "batches": "raypar.train.data",
        "Cluster": "raypar.mesh.cluster",
        "OpGraph": "raypar.graph.opgraph",
        "Result": "raypar.train.result",
        "RunConfig": "raypar.train.config",
        "ScalingConfig": "raypar.train.config",
        "SearchConfig": "raypar.search.config",
        "Trainer": "raypar.train.trainer",
        "capture": "raypar.graph.capture",
        "explain": "raypar.report.explain",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)


class _PlanModule(types.ModuleType):
    """Makes `raypar.plan` both the module of `Plan` and the function that makes one.

    Importing a submodule binds it on its package, so a function of that name in the package would
    be lost at the first ``import raypar.plan``; a module that can be called is never lost.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Plan:
        from raypar.search.plan import plan

        return plan(*args, **kwargs)


_plan_module.__class__ = _PlanModule
if not TYPE_CHECKING:
    plan = sys.modules["raypar.plan"]
