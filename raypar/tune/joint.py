"""One Optuna study over a model's hyper-parameters and the plans that train it.

Which hyper-parameters are best for a given time depends on how fast the model trains, and so on
its plan: a deeper model may learn more from every step and take fewer of them. So each trial here
is a model of its own, with a plan that raypar searches for it (or finds in the plan cache), and is
judged by what a short run of that plan really reaches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import optuna

from raypar._plan_text import count_of, table
from raypar.errors import ConfigError, NonFiniteError, PlanError, RayparError
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.train.callbacks import Callback, RunFacts
from raypar.train.config import CheckpointConfig
from raypar.train.trainer import Trainer

_PLAN, _WHY, _JUDGED = "plan", "why", "judged by"


@dataclasses.dataclass(frozen=True)
class JointStudy:
    """What a joint study found.

    Attributes:
        study: Optuna's study: every trial with its parameters, values, and as user attributes
            ``plan`` (JSON), ``plan_stages``, ``plan_replicas``, ``planning_s``, ``steps``,
            ``seconds`` of its steps.
        folder: Folder of the trials' runs.
    """

    study: optuna.Study
    folder: Path

    @property
    def best_params(self) -> dict[str, Any]:
        """The hyper-parameters of the best trial."""
        return dict(self.study.best_params)

    @property
    def best_value(self) -> float:
        """What the best trial reached."""
        return float(self.study.best_value)

    @property
    def best_plan(self) -> Plan:
        """The plan that the best trial ran under."""
        return Plan.from_json(self.study.best_trial.user_attrs[_PLAN])

    def describe(self) -> str:
        """A table with a line for each trial; the best one has a star."""
        trials = self.study.trials
        if not trials:
            return "no trials"
        best = next((trial.number for trial in self.study.best_trials), None)
        judged = self.study.user_attrs.get(_JUDGED, "value")
        rows = [_row(trial, best) for trial in trials]
        titles = ("", "trial", judged, "plan", "planned in", "parameters", "")
        columns = [(t, cells) for t, *cells in zip(titles, *rows, strict=True)]
        # What is the same for all, such as that nothing went wrong, is no column.
        return "\n".join(table([(t, cells) for t, cells in columns if any(cells)]))


def joint_study(
    make: Callable[[optuna.Trial], Trainer],
    *,
    trials: int = 20,
    metric: str = "loss",
    time_budget_s: float | None = None,
    target: float | None = None,
    direction: Literal["minimize", "maximize"] = "minimize",
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | None = None,
    name: str = "joint",
    seed: int = 0,
) -> JointStudy:
    """Searches hyper-parameters and plans at once, each trial judged by a short run.

    Args:
        make: Suggests hyper-parameters with Optuna's trial, and makes the trainer. Decisions of
            the plan can be suggested too (``SearchConfig(stages=trial.suggest_int(...))``); what
            is left ``auto`` raypar searches, once for each model.
        trials: Number of trials.
        metric: What is judged: a number in the lines of ``metrics.jsonl`` (``loss``), or an
            evaluation's (``eval_loss``).
        time_budget_s: Training seconds of a trial; None leaves it to the trainer. A budget makes
            fast plans count: the value is what was reached when it is over.
        target: Judge by the seconds of training until `metric` reaches this, in place of what it is
            in the end. A trial that does not reach it counts with all its seconds, and one more for
            every unit that is missing.
        direction: Whether ``"minimize"`` or ``"maximize"`` of the metric is better.
        sampler: Optuna's; default: TPE with `seed`, which models all parameters together.
        pruner: Optuna's; default: none. With one, every step is reported.
        storage: Optuna's storage URL; a study of that name in it is gone on with.
        name: Of the study, and beginning of its runs' names.
        seed: Of the sampler.

    Returns:
        The study, and the best plan in it.

    Raises:
        ConfigError: A value is out of range, or no run has such a metric.
        RayparError: A trial failed for a reason that another trial would meet too. A model that
            fits no plan, or whose loss is not finite, only counts as pruned.
    """
    if direction not in ("minimize", "maximize"):
        raise ConfigError(f"direction is {direction!r}; give 'minimize' or 'maximize'")
    if trials < 1:
        raise ConfigError(f"trials is {trials!r}; give at least 1")
    if time_budget_s is not None and not time_budget_s > 0:
        raise ConfigError(
            f"time_budget_s is {time_budget_s!r}; give seconds above 0, for example 60"
        )
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=storage is not None,
        sampler=sampler or optuna.samplers.TPESampler(seed=seed, multivariate=True),
        pruner=pruner or optuna.pruners.NopPruner(),
        direction="minimize" if target is not None else direction,
    )
    judged = metric if target is None else f"seconds to {metric} {target:g}"
    study.set_user_attr(_JUDGED, judged)
    objective = _Objective(make, metric, direction, time_budget_s, target, name)
    study.optimize(objective, n_trials=trials)
    return JointStudy(study, objective.folder)


@dataclasses.dataclass
class _Objective:
    """What Optuna calls for every trial."""

    make: Callable[[optuna.Trial], Trainer]
    metric: str
    direction: str
    budget_s: float | None
    target: float | None
    name: str
    folder: Path = Path()

    def __call__(self, trial: optuna.Trial) -> float:
        watch = _Watch(trial, self.metric, self.direction, self.target)
        trainer = self._prepared(self.make(trial), trial, watch)
        try:
            with contextlib.suppress(_Reached):
                trainer.fit()
        except (PlanError, NonFiniteError) as error:
            trial.set_user_attr(_WHY, f"{type(error).__name__}: {error}")
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("steps", watch.steps)
        trial.set_user_attr("seconds", watch.seconds)
        if watch.value is None:
            raise ConfigError(
                f"metric is {self.metric!r}; the run told {sorted(watch.seen)}. Metrics of "
                "evaluations need eval_data, and a budget that lasts until the first one"
            )
        if self.target is None:
            return watch.value
        sign = 1.0 if self.direction == "minimize" else -1.0
        return watch.seconds + max(0.0, sign * (watch.value - self.target))

    def _prepared(self, trainer: Trainer, trial: optuna.Trial, watch: _Watch) -> Trainer:
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"joint_study: make returned {type(trainer).__name__}; it must return a "
                "raypar.Trainer"
            )
        settings = trainer.settings
        self.folder = Path(settings.run.storage_path)
        search = settings.search or SearchConfig()
        return trainer.changed(
            time_limit_s=self.budget_s or settings.time_limit_s,
            search=search if search.cache else dataclasses.replace(search, cache=True),
            run=dataclasses.replace(
                settings.run,
                name=f"{self.name}-{trial.number}",
                log_every=0,
                checkpoint_config=CheckpointConfig(at_end=False),
                callbacks=(*settings.run.callbacks, watch),
            ),
        )


class _Reached(RayparError):
    """The run has reached its target; it is ended."""


class _Watch(Callback):
    """Follows one trial's run."""

    def __init__(
        self, trial: optuna.Trial, metric: str, direction: str, target: float | None
    ) -> None:
        self._trial = trial
        self._metric = metric
        self._sign = 1.0 if direction == "minimize" else -1.0
        self._target = target
        self.value: float | None = None
        self.steps = 0
        self.seconds = 0.0
        self.seen: set[str] = set()

    def on_start(self, run: RunFacts) -> None:
        """See `Callback.on_start`."""
        self._trial.set_user_attr(_PLAN, run.plan.to_json())
        self._trial.set_user_attr("plan_stages", len(run.plan.stages))
        self._trial.set_user_attr("plan_replicas", run.plan.replicas)
        self._trial.set_user_attr("planning_s", run.startup.get("plan", 0.0))

    def on_step(self, line: dict[str, Any]) -> None:
        """See `Callback.on_step`."""
        self.steps = int(line["step"]) + 1
        self.seconds += float(line.get("step_s") or 0.0)
        self._look(line)

    def on_evaluation(self, line: dict[str, Any]) -> None:
        """See `Callback.on_evaluation`."""
        self._look(line)

    def _look(self, line: dict[str, Any]) -> None:
        self.seen.update(k for k, v in line.items() if isinstance(v, (int, float)))
        if self._metric not in line:
            return
        self.value = float(line[self._metric])
        if self._target is not None and self._sign * self.value <= self._sign * self._target:
            raise _Reached
        self._trial.report(self.value, self.steps)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"after {self.steps} steps")


def _row(trial: optuna.trial.FrozenTrial, best: int | None) -> tuple[str, ...]:
    """The cells of a trial."""
    facts = trial.user_attrs
    stages, replicas = facts.get("plan_stages"), facts.get("plan_replicas")
    planning = facts.get("planning_s")
    return (
        "*" if trial.number == best else "",
        str(trial.number),
        "-" if trial.value is None else f"{trial.value:.6g}",
        "-"
        if stages is None or replicas is None
        else f"{count_of(stages, 'stage')} × {count_of(replicas, 'replica')}",
        "-" if planning is None else f"{planning:.2f} s",
        ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items()),
        facts.get(_WHY, ""),
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
