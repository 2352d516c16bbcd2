"""Starts a run that sees the same batch in every step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from raypar.errors import ConfigError
from raypar.stages.batch import RepeatFeed
from raypar.stages.local import LocalRun
from raypar.stages.run import Run
from raypar.stages.spec import RankSpec

__all__ = ["RepeatFeed", "start_run"]


def start_run(backend: str, specs: Sequence[RankSpec], tensors: Sequence[torch.Tensor]) -> Run:
    """A run of `specs`, not started, on threads (``local``) or on Ray actors (``ray``).

    Raises:
        ConfigError: Another backend name.
    """
    feed = partial(RepeatFeed, tensors=list(tensors))
    if backend == "local":
        return LocalRun(specs, feed=feed)
    if backend == "ray":
        from raypar.stages.remote import RayRun

        return RayRun(specs, feed=feed)
    raise ConfigError(f"backend is {backend!r}; valid are local, ray")
