"""What a search is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Auto = Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Options of `raypar.plan`; ``auto`` lets the planner choose.

    Attributes:
        planner: A registered planner: ``alpa``, ``uniform`` or ``manual``. ``auto`` is ``uniform``
            where the plan's shape is given (`stages`, `replicas`, `tensor` or `chunks`), which it
            obeys without looking further, else ``alpa``.
        stages: Number of stages.
        replicas: Data-parallel replicas of every stage.
        tensor: Devices over which the ops of a stage are sharded (tensor parallelism).
        microbatches: M.
        schedule: Name of the schedule.
        chunks: Stages per rank group (over 1 needs a schedule that interleaves).
        recompute: Memory policy of every stage.
        zero: ZeRO level of every stage.
        memory_fraction: Share of a device's memory that a plan may fill.
        optimizer_states: Tensors that the optimizer keeps for each parameter (Adam: 2).
        sampler: Who proposes outer decisions in planner ``optuna``: ``tpe``, ``gp``, ``cmaes``,
            ``nsga2`` (step time × peak memory × devices), ``random``.
        trials: Proposals to look at.
        budget_s: Seconds to search; measurements count.
        seed: Same seed and budget in trials → same plan.
        seeds: Planners whose plans the study starts from; ``auto``: every one that takes the
            options.
        cost_model: ``analytic``, ``learned`` (corrects it by what was measured on such a cluster)
            or ``auto``: learned where there are measurements.
        measure: Plans that may really be run, where the search is given someone who runs them.
        storage: Path of the study's journal, which is resumed if it is there.
        cache: Whether a plan that was found before for the same question is taken again.
        manual: For ``manual``: path of a plan file, or a dict of plan fields that override what
            ``uniform`` makes of the other options.
    """

    planner: str = "auto"
    stages: int | Auto = "auto"
    replicas: int | Auto = "auto"
    tensor: int | Auto = "auto"
    microbatches: int | Auto = "auto"
    schedule: str = "auto"
    chunks: int = 1
    recompute: str = "auto"
    zero: int | Auto = "auto"
    memory_fraction: float = 0.9
    optimizer_states: int = 2
    sampler: str = "tpe"
    trials: int | Auto = "auto"
    budget_s: float | Auto = "auto"
    seed: int = 0
    seeds: tuple[str, ...] | Auto = "auto"
    cost_model: str = "auto"
    measure: int | Auto = "auto"
    storage: str | None = None
    cache: bool = False
    manual: str | dict[str, Any] | None = None

    @property
    def chosen_planner(self) -> str:
        """What ``auto`` stands for."""
        if self.planner != "auto":
            return self.planner
        given = (self.stages, self.replicas, self.tensor) != ("auto",) * 3 or self.chunks != 1
        return "uniform" if given else "alpa"
