"""What a search is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Options of `raypar.plan`; ``auto`` lets the planner choose.

    Attributes:
        planner: A registered planner: ``uniform`` or ``manual``.
        stages: Number of stages.
        replicas: Data-parallel replicas of every stage.
        microbatches: M.
        schedule: Name of the schedule.
        chunks: Stages per rank group (over 1 needs a schedule that interleaves).
        recompute: Memory policy of every stage.
        manual: For ``manual``: path of a plan file, or a dict of plan fields that override what
            ``uniform`` makes of the other options.
    """

    planner: str = "uniform"
    stages: int | Auto = "auto"
    replicas: int | Auto = "auto"
    microbatches: int | Auto = "auto"
    schedule: str = "auto"
    chunks: int = 1
    recompute: str = "none"
    manual: str | dict[str, Any] | None = None
