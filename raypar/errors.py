"""The one error tree.

Every message tells what was asked, what was found, the binding constraint with its numbers, and
the key to change with a value that works.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RayparError(Exception):
    """Base of every error that raypar raises on purpose."""

    def __reduce__(self) -> tuple[object, ...]:
        # Subclasses may take keyword arguments; rebuild from the finished message so that every
        # error survives the trip between Ray processes.
        return (_rebuild, (type(self), str(self), self.__dict__))


def _rebuild(cls: type[RayparError], message: str, state: dict[str, object]) -> RayparError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class ConfigError(RayparError):
    """A configuration key or value is wrong."""


class CaptureError(RayparError):
    """The model cannot be turned into an operator graph."""


class PlanError(RayparError):
    """A plan is malformed, or does not fit the graph or the cluster it is used with."""


class NothingFitsError(PlanError):
    """A planner found no plan that fits the memory.

    `raypar.search.plan.search` says why in its place, which takes plans of its own.
    """


class ScheduleError(RayparError):
    """An instruction list deadlocks, leaks a value or uses one that does not exist."""


class ClusterError(RayparError):
    """The cluster is unreachable, or cannot hold what was asked of it."""


class CommError(RayparError):
    """A transfer or collective failed."""


class CommTimeoutError(CommError):
    """A transfer or collective did not finish before its deadline."""


class CommAbortedError(CommError):
    """The group was aborted while a call was waiting, or before it began."""


class DataError(RayparError):
    """The data source raised, ended early, or yielded a batch of the wrong form."""


class OptimizerError(RayparError):
    """The optimizer cannot be used, or raised."""


class CheckpointError(RayparError):
    """A checkpoint cannot be written, is damaged, or is not of this model."""


class TrainingError(RayparError):
    """A running job failed."""


class NonFiniteError(TrainingError):
    """The loss, an activation or a gradient became NaN or infinite."""


class StageDiedError(TrainingError):
    """A stage actor or its node was lost."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns `` Did you mean 'x'?`` for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
