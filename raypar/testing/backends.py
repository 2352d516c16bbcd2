"""Starts a run that sees the same batch in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from raypar.comm.group import Group
from raypar.errors import ConfigError
from raypar.stages.batch import shard_batch
from raypar.stages.local import LocalRun
from raypar.stages.run import Run
from raypar.stages.spec import RankSpec


class RepeatFeed:
    """Gives a rank its rows of one batch, step after step."""

    def __init__(self, spec: RankSpec, world: Group, tensors: Sequence[torch.Tensor]) -> None:
        self._inputs = shard_batch(spec, tensors)

    def extend(self, until: int) -> None:
        """Nothing to read ahead."""

    def take(self, step: int) -> Mapping[str, torch.Tensor]:
        """This rank's rows, the same for every step."""
        return self._inputs

    def abort(self, reason: str) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Drops the rows."""
        self._inputs = {}


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
