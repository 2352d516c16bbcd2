"""Optuna's side of the study: who proposes next, and what Optuna is told of it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.interop.contest import in_words
from raypar.search.study.judge import Outcome
from raypar.search.study.samplers import (
    PARETO,
    WITHOUT_CONSTRAINTS,
    quiet_optuna,
    sampler_of,
    storage_of,
)
from raypar.search.study.space import Decisions, Space

NEIGHBOUR = "neighbour"
"""Proposer of what differs from the best so far in one decision, or in a trade of devices."""
_PENALTY = 10.0
"""Step time of a proposal without a plan, as a multiple of the slowest one that was seen."""
_FEW = 10
"""Different outcomes that it takes to tell which decisions matter."""


@dataclass(frozen=True)
class Asked:
    """A proposal.

    Attributes:
        trial: Optuna's.
        decisions: What is proposed.
        proposer: Who proposes it.
    """

    trial: optuna.Trial
    decisions: Decisions
    proposer: str


class Proposals:
    """An Optuna study over the outer decisions.

    Args:
        config: Sampler, seed and journal.
        name: Of the study; one of that name in the journal is resumed.
        space: What is decided on.
        parallel: Whether proposals are made while others are looked at.

    Attributes:
        note: What the user should know about the journal; mostly empty.

    Raises:
        ConfigError: There is no such sampler, or the journal cannot be written.
    """

    def __init__(self, config: SearchConfig, name: str, space: Space, *, parallel: bool) -> None:
        self.config = config
        self.space = space
        self.pareto = config.sampler in PARETO
        self._near: Iterator[dict[str, Any]] = iter(())
        self._near_of, self._near_turn = -1, False
        self._slowest = 0.0
        self._open: dict[int, optuna.Trial] = {}
        storage, self.note = storage_of(config.storage)
        with quiet_optuna():
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * (3 if self.pareto else 1),
                load_if_exists=True,
            )
            # A study that goes on does not propose again what it proposed before.
            seed = config.seed + len(self.study.trials)
            self.study.sampler = sampler_of(config.sampler, seed, parallel=parallel)
            if config.storage is not None and not self.study.user_attrs:
                self._describe()

    def _describe(self) -> None:
        """Tells who looks into the journal what this study is about."""
        sizes = ["peak memory (bytes)", "devices"] if self.pareto else []
        self.study.set_metric_names(["step (s)", *sizes])
        graph = self.space.bench.graph
        about = {
            "model": f"{len(graph.ops)} ops, global batch {graph.global_batch}",
            "cluster": self.space.bench.cluster.describe(),
            "sampler": self.config.sampler,
            "seed": self.config.seed,
        }
        for key, value in about.items():
            self.study.set_user_attr(key, value)

    def finished(self) -> list[FrozenTrial]:
        """Trials of the journal that came to an end, those that fit first, the fastest first."""
        done = [t for t in self.study.trials if t.state == TrialState.COMPLETE]
        return sorted(done, key=lambda t: (any(v > 0 for v in t.constraints.values()), t.values[0]))

    def of(self, trial: FrozenTrial) -> tuple[str, Decisions]:
        """(proposer, decisions) of a trial of the journal."""
        decisions = self.space.suggest(optuna.trial.FixedTrial(trial.params))
        return str(trial.user_attrs.get("proposer", "journal")), decisions

    def near_plan(self, plan: Plan, proposer: str) -> Asked:
        """The proposal that is nearest to a plan."""
        return self._ask(proposer, self.space.parameters_of(plan))

    def next(self, best: int, plan: Plan | None) -> Asked:
        """The next proposal: the sampler's, in turn with a neighbour of the best.

        Args:
            best: Optuna's number of the best trial so far; -1 where there is none.
            plan: Its plan.
        """
        if best < 0 or plan is None or self.config.sampler == "random":
            return self._ask(self.config.sampler)
        if best != self._near_of:
            self._near_of = best
            self._near = self.space.neighbours(self.study.trials[best].params, plan)
        self._near_turn = not self._near_turn
        near = next(self._near, None) if self._near_turn else None
        return self._ask(self.config.sampler) if near is None else self._ask(NEIGHBOUR, near)

    def _ask(self, proposer: str, params: Mapping[str, Any] | None = None) -> Asked:
        trial = self.study.ask() if params is None else self._given(params)
        self._open[trial.number] = trial
        return Asked(trial, self.space.suggest(trial), proposer)

    def _given(self, params: Mapping[str, Any]) -> optuna.Trial:
        """A trial of given parameters.

        It does not go through Optuna's queue: of that, whoever asks next takes the first, and that
        may be another process on the same journal.
        """
        mark = uuid.uuid4().hex
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                system_attrs={"fixed_params": dict(params)},
                user_attrs={"mark": mark},
            )
        )
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own = next(t for t in running if t.user_attrs.get("mark") == mark)
        return optuna.Trial(self.study, own._trial_id)

    def close(self) -> None:
        """Nobody will tell any more what became of proposals that are still open."""
        for trial in self._open.values():
            self.study.tell(trial, state=TrialState.FAIL)
        self._open.clear()

    def tell(self, asked: Asked, outcome: Outcome, expected_s: float, *, profile: str = "") -> None:
        """Tells what became of a proposal: seconds of a step, and memory as a constraint.

        Args:
            asked: The proposal.
            outcome: What it came to.
            expected_s: Seconds of a step that are expected of its plan.
            profile: Why none of its stages can be profiled; empty where one can.
        """
        trial = asked.trial
        self._open.pop(trial.number, None)
        trial.set_user_attr("proposer", asked.proposer)
        if outcome.plan is not None:
            trial.set_user_attr("plan", in_words(outcome.plan))
        if outcome.reason:
            trial.set_user_attr("reason", outcome.reason)
        if profile:
            trial.set_user_attr("profile", profile)
        over = outcome.overfull or (2.0 if outcome.state in ("infeasible", "failed") else 0.0)
        step = expected_s if outcome.step_s else _PENALTY * (self._slowest or 1.0)
        if outcome.step_s:
            self._slowest = max(self._slowest, step)
        if self.config.sampler in WITHOUT_CONSTRAINTS:
            step *= max(over, 1.0) ** 2
        else:
            trial.set_constraint("memory", over - 1.0)
        if self.pareto:
            self.study.tell(trial, [step, *self._sizes(outcome, over)])
            return
        for at, name in enumerate(outcome.step_s):
            trial.report(outcome.step_s[name], at)
        pruned = outcome.state == "pruned"
        self.study.tell(trial, None if pruned else step, TrialState.PRUNED if pruned else None)

    def _sizes(self, outcome: Outcome, over: float) -> tuple[float, float]:
        """(peak bytes, devices) of what was proposed; of what has no plan, what it would need."""
        cluster = self.space.bench.cluster
        if outcome.plan is not None and outcome.peak_bytes:
            return float(outcome.peak_bytes), float(len(outcome.plan.devices))
        memory = max(cluster.memory(d) for d in range(cluster.n_devices))
        return memory * max(over, 1.0), float(cluster.n_devices)

    def learn(self, number: int, step_s: float, attributes: Mapping[str, str | bool]) -> None:
        """Tells what is known better of a proposed plan, as one more trial like its own.

        Args:
            number: Optuna's, of the proposal.
            step_s: What its steps really took, or are expected to take.
            attributes: Where that comes from.
        """
        if self.pareto:
            return
        like = self.study.trials[number]
        self.study.add_trial(
            optuna.trial.create_trial(
                params=like.params,
                distributions=like.distributions,
                value=step_s,
                user_attrs={**like.user_attrs, **attributes},
                system_attrs=like.system_attrs,
            )
        )

    def importance(self) -> dict[str, float]:
        """Share of the spread of step times that each decision explains (Watanabe et al. 2023)."""
        done = [t for t in self.study.trials if t.state == TrialState.COMPLETE]
        if self.pareto or len({t.value for t in done}) < _FEW:
            return {}
        try:
            with quiet_optuna():
                found = optuna.importance.get_param_importances(
                    self.study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
                )
        except (ValueError, RuntimeError):  # no decision is part of all trials
            return {}
        return {name: float(share) for name, share in found.items()}
