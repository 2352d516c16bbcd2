"""A step in time, however it came about: simulated, read from a file, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raypar.search.simulation import LaneReport, MemoryTimeline, Span


class PlayedStep(Protocol):
    """What drawings need of a step; `raypar.search.simulation.Simulation` is one."""

    @property
    def step_s(self) -> float:
        """Its seconds."""

    @property
    def lanes(self) -> Sequence[LaneReport]:
        """Ranks that go in step."""

    @property
    def memory(self) -> Sequence[MemoryTimeline]:
        """What each of a lane's ranks holds over time."""

    @property
    def peak_bytes(self) -> Sequence[int]:
        """The most of that."""

    def spans(self, lane: int) -> list[Span]:
        """What a lane does, in order."""
