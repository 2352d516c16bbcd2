"""What a search is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from raypar.errors import ConfigError, did_you_mean

Auto = Literal["auto"]
SAMPLERS = ("tpe", "gp", "cmaes", "nsga2", "random")
COST_MODELS = ("auto", "analytic", "learned")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    """Options of `raypar.plan`; ``auto`` lets the planner choose.

    Attributes:
        planner: A registered planner: ``optuna`` (a study over all outer decisions), ``alpa``,
            ``uniform``, ``manual`` or another. ``auto`` is ``uniform`` where the plan's shape is
            given (`stages`, `replicas`, `tensor` or `chunks`), which it obeys without looking
            further, else ``optuna``.
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
        budget_s: Seconds to search; measurements count. Planners ``alpa`` and ``piper`` stop trying
            once they are over and something was found.
        seed: Same seed and budget in trials → same plan.
        seeds: Planners whose plans the study starts from; ``auto``: ``alpa``, ``piper``, and for
            models that are not too long (`raypar.search.study.seeds`) ``placement``; on 8 or more
            devices that are all alike also regular plans (`raypar.search.study.regular`), every
            stage alike.
        cost_model: ``analytic``, ``learned`` (corrects it by what was measured on such a cluster)
            or ``auto``: learned where there are measurements.
        measure: Plans that may really be run, where the search is given someone who runs them.
        profile: Stages that planner ``optuna`` may profile: of a plan that could be the best, the
            one that decides most is run alone on one device, before whole steps are. One device is
            enough for a plan over thousands of its kind; where there is none, that is left out.
            ``auto``: 8 where the search is given someone who runs stages (`Trainer` gives it), else
            none. A number: this machine runs them where nobody else is given.
        storage: Path of the study's journal, which is resumed if it is there.
        cache: Whether a plan that was found before for the same question is taken again. Off here,
            so that a call from Python does what it says; on in config files. A path is the folder
            to keep plans in, where it is not to be this machine's.
        manual: For ``manual``: path of a plan file, or a dict of plan fields that override what
            ``uniform`` makes of the other options.

    Raises:
        ConfigError: No such sampler or cost model, or a budget that allows nothing. Options of
            the plan itself are checked against graph and cluster by the planners.
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
    profile: int | Auto = "auto"
    storage: str | None = None
    cache: bool | str = False
    manual: str | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _one_of("sampler", self.sampler, SAMPLERS)
        _one_of("cost_model", self.cost_model, COST_MODELS)
        _whole("trials", self.trials, 1, "a search looks at one plan or more, for example 100")
        _whole("measure", self.measure, 0, "0 is none, for example 8")
        _whole("profile", self.profile, 0, "0 is none, for example 8")
        if self.cost_model == "analytic" and self.profile not in ("auto", 0):
            raise ConfigError(
                f"search.profile is {self.profile}, but search.cost_model analytic takes no "
                "measurement in: set search.cost_model: auto, or search.profile: 0"
            )
        _whole("seed", self.seed, 0, "for example 0", auto=False)
        budget: Any = self.budget_s
        if budget != "auto" and not (_is_number(budget) and 0 < budget < math.inf):
            raise ConfigError(
                f"search.budget_s is {budget!r}; a search needs seconds: give a number above 0, "
                "for example 30, or auto; search.planner uniform plans without a search"
            )
        seeds: Any = self.seeds
        if seeds != "auto" and (
            isinstance(seeds, str) or not all(isinstance(name, str) for name in seeds)
        ):
            raise ConfigError(
                f"search.seeds is {seeds!r}; give names of planners, for example ('alpa',), () for "
                "none, or auto"
            )

    @property
    def chosen_planner(self) -> str:
        """What ``auto`` stands for."""
        if self.planner != "auto":
            return self.planner
        given = (self.stages, self.replicas, self.tensor) != ("auto",) * 3 or self.chunks != 1
        return "uniform" if given else "optuna"


def _one_of(key: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = did_you_mean(str(value), valid)
        raise ConfigError(f"search.{key} is {value!r}; valid are {', '.join(valid)}.{near}")


def _whole(key: str, value: Any, least: int, words: str, auto: bool = True) -> None:
    if auto and value == "auto":
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"search.{key} is {value!r}; give a whole number of at least {least}: {words}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
