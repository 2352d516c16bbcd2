"""A run that shows what crosses the borders of its stages."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raypar.comm.group import Group
from raypar.schedules.instructions import Instruction
from raypar.stages.batch import shard_batch
from raypar.stages.holdings import HeldStage, Workshop
from raypar.stages.interpreter import GRAD, RankRunner
from raypar.stages.spec import RankSpec


@dataclass
class Seen:
    """Values at the borders of stages as ranks hold them, in one step.

    Attributes:
        values: (what, id, stage, microbatch, rank) → this rank's part; `what` is ``received``,
            ``activation``, ``loss`` or ``gradient``.
    """

    values: dict[tuple[str, str, int, int, int], torch.Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, key: tuple[str, str, int, int, int], value: torch.Tensor) -> None:
        """Keeps a copy of a value; from any thread."""
        with self.lock:
            self.values[key] = value.detach().clone()


class WatchedRunner(RankRunner):
    """The interpreter, which shows what crosses borders."""

    def __init__(self, spec: RankSpec, world: Group, *, seen: Seen, workshop: Workshop) -> None:
        super().__init__(spec, world, workshop=workshop)
        self._seen = seen

    def _forward(self, now: Instruction) -> None:
        stage, microbatch = self._stage(now)
        index, rank = stage.spec.index, self.spec.rank
        for edge in stage.spec.arrivals:
            self._seen.note(
                ("received", edge, index, microbatch, rank), self._values[edge, microbatch]
            )
        super()._forward(now)
        for edge in stage.spec.edges_out:
            self._seen.note(
                ("activation", edge, index, microbatch, rank), self._values[edge, microbatch]
            )

    def _backward_box(self, stage: HeldStage, microbatch: int) -> list[Any] | None:
        for edge in stage.spec.edges_out:
            gradient = self._values.get((GRAD + edge, microbatch))
            if gradient is not None:
                key = ("gradient", edge, stage.spec.index, microbatch, self.spec.rank)
                self._seen.note(key, gradient)
        return super()._backward_box(stage, microbatch)


class TurnFeed:
    """Gives a rank its rows of some batches in turn."""

    def __init__(
        self, spec: RankSpec, world: Group, batches: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        self._rows = [shard_batch(spec, tensors) for tensors in batches]

    def extend(self, until: int) -> None:
        """Nothing to read ahead."""

    def take(self, step: int) -> Mapping[str, torch.Tensor]:
        """This rank's rows for `step`."""
        return self._rows[step % len(self._rows)]

    def abort(self, reason: str) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is held open."""
