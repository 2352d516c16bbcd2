"""What a plan is worth: from the solvers' sums to a simulated step, each figure if it is needed."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from raypar.errors import RayparError
from raypar.fit import check_plan
from raypar.lowered import LoweredPlan
from raypar.plan import Plan
from raypar.schedules.instructions import Kind
from raypar.search.cost.base import CostModel, StageCode, stage_code
from raypar.search.cost.features import stage_work
from raypar.search.cost.learned import LearnedCost
from raypar.search.cost.machine import MeshMachine, machine_of
from raypar.search.cost.profiled import Seconds
from raypar.search.cost.rows import StepRow
from raypar.search.cost.step_correction import step_features
from raypar.search.cost.store import MeasurementStore
from raypar.search.interop.contest import entry_of, in_words
from raypar.search.interop.space import MANY_UNLIKE
from raypar.search.interop.workbench import Workbench
from raypar.search.lowering import lowered_for_search
from raypar.search.measure import Measured, ProfiledStage
from raypar.search.record import TrialRecord
from raypar.search.simulate import simulate
from raypar.search.simulation import Simulation
from raypar.search.study.draft import Drafter, InfeasibleError
from raypar.search.study.obey import disobeyed
from raypar.search.study.space import Decisions, Space

_AGAIN, _NEAR, _MARGIN = 2, 1.5, 0.98
"""A plan that is nearly small enough is drafted again so often, for less memory than it needs."""


@dataclass(frozen=True)
class Outcome:
    """What became of a proposal.

    Attributes:
        state: As in `raypar.search.record.TrialRecord`.
        plan: The plan, with what its simulation says; None where there is none.
        step_s: Fidelity → seconds of a step.
        peak_bytes: Most that a device would hold.
        overfull: The same as a multiple of what it may fill.
        reason: Why it was pruned, infeasible or failed.
        features: What the correction by measured steps looks at.
        seconds: What looking at it took.
        version: `Judge.version` when its step was predicted.
    """

    state: str
    plan: Plan | None = None
    step_s: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    overfull: float = 0.0
    reason: str = ""
    features: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    version: int = 0

    @property
    def predicted_s(self) -> float:
        """Seconds of a step, by the best model that was asked."""
        for name in ("profiled", "learned", "simulated", "quick"):
            if name in self.step_s:
                return self.step_s[name]
        return float("inf")

    def record(self, number: int, proposer: str, decisions: Decisions | None) -> TrialRecord:
        """The record of it."""
        plan = self.plan
        return TrialRecord(
            number=number,
            proposer=proposer,
            decisions=decisions.named() if decisions else {},
            state=self.state,
            step_s=dict(self.step_s),
            peak_bytes=self.peak_bytes,
            overfull=self.overfull,
            devices=len(plan.devices) if plan else 0,
            reason=self.reason,
            words=in_words(plan) if plan else "",
            seconds=self.seconds,
        )


@dataclass(frozen=True)
class Unknown:
    """A stage that was never profiled.

    Attributes:
        index: Its number in the plan.
        code: Its code.
        machine: Where it runs.
        seconds: What a forward and a backward pass of it are predicted to take alone.
        halves: Whether its plan runs backward passes in halves.
    """

    index: int
    code: StageCode
    machine: MeshMachine
    seconds: float
    halves: bool


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """No collection of garbage meanwhile.

    Lowering makes graphs of many thousand nodes, each of which would set off walks over all of
    those that are kept: a fifth of the time that a plan takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Judge:
    """Looks at proposals and at plans of others.

    Args:
        bench: The model on the cluster.

    Attributes:
        learned: Corrects the analytic cost model by what was measured; None: the options want the
            analytic one, or nothing was measured yet.
        version: How often it has learned from stages that were profiled on the way.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.space = Space(bench)
        self.drafter = Drafter(self.space)
        self.learned: LearnedCost | None = None
        self.version = 0
        if bench.config.cost_model != "analytic":
            self.store = MeasurementStore.for_cluster(bench.cluster)
            if len(self.store.stages) or bench.config.cost_model == "learned":
                self.learned = self._learned_cost()

    def look(
        self,
        decisions: Decisions,
        limits: Mapping[str, float] | None = None,
        *,
        axes: int | None = None,
    ) -> Outcome:
        """Carries decisions out and judges the plan.

        Args:
            decisions: What was proposed.
            limits: Fidelity → seconds of a step beyond which a plan cannot win.
            axes: As in `Drafter.draft`; None: one on large clusters of unequal devices, where
                there are tables for every kind of place, and any number else.
        """
        if axes is None and not self.bench.alike and self.bench.cluster.n_devices >= MANY_UNLIKE:
            axes = 1
        began = time.perf_counter()
        try:
            draft = self.drafter.draft(decisions, axes=axes)
        except InfeasibleError as error:
            took = time.perf_counter() - began
            return Outcome("infeasible", reason=str(error), overfull=error.overfull, seconds=took)
        except RayparError as error:
            took = time.perf_counter() - began
            return Outcome("failed", reason=str(error), seconds=took)
        limit = (limits or {}).get("quick", float("inf"))
        if draft.step_s > limit:
            return Outcome(
                "pruned",
                draft.plan(self.bench),
                {"quick": draft.step_s},
                reason=f"quick figures say {draft.step_s:.3g} s, over {limit:.3g} s",
                seconds=time.perf_counter() - began,
            )
        found = self.play(draft.plan(self.bench), quick=draft.step_s)
        limit = (limits or {}).get("simulated", float("inf"))
        share = 1.0
        for _ in range(_AGAIN):
            if not 1.0 < found.overfull < _NEAR or found.predicted_s > limit:
                break
            # The solvers' figures of memory are rough: they may count on as much less.
            share *= _MARGIN / found.overfull
            try:
                draft = self.drafter.draft(decisions, share, axes=axes)
            except InfeasibleError:
                break
            found = self.play(draft.plan(self.bench), quick=draft.step_s)
        return replace(found, seconds=time.perf_counter() - began)

    def play(self, plan: Plan, quick: float | None = None) -> Outcome:
        """Lowers and simulates a plan."""
        with _collecting_later():
            return self._play(plan, quick)

    def _play(self, plan: Plan, quick: float | None) -> Outcome:
        began = time.perf_counter()
        step_s: dict[str, float] = {} if quick is None else {"quick": quick}
        if wrong := disobeyed(plan, self.bench.config):
            return Outcome("infeasible", plan, step_s, reason=wrong)
        try:
            check_plan(plan, self.bench.graph, self.bench.cluster)
            lowered = self._lower(plan)
            played = self._simulate(plan, lowered, "analytic")
            entry = entry_of(plan, played, self.bench.config.memory_fraction)
            step_s["simulated"] = played.step_s
            if self.learned is not None:
                step_s["learned"] = self._simulate(plan, lowered, self.learned).step_s
        except RayparError as error:
            took = time.perf_counter() - began
            return Outcome("failed", plan, step_s, reason=str(error), seconds=took)
        over = entry.overfull > 1.0
        return Outcome(
            "infeasible" if over else "kept",
            entry.plan,
            step_s,
            max(played.peak_bytes),
            entry.overfull,
            f"fills its devices {entry.overfull:.2f} times over" if over else "",
            features=step_features(plan, played),
            seconds=time.perf_counter() - began,
            version=self.version,
        )

    def _learned_cost(self) -> LearnedCost:
        return LearnedCost(self.store, origin=self.bench.graph.params_hash)

    # -- stages profiled alone ----------------------------------------------------------------

    def unknown(self, plan: Plan, may_run: Callable[[MeshMachine], bool]) -> Unknown | None:
        """The stage of a plan that is worth most to profile; None where all are known.

        It is the one whose time is least sure in seconds; a program that several stages share
        counts for all of them.

        Args:
            plan: The plan.
            may_run: Whether stages for a mesh can be profiled.
        """
        lowered = self._lower(plan)
        halves = any(one.kind is Kind.BACKWARD_INPUT for own in lowered.lists for one in own)
        model = self.learned or self._learned_cost()
        programs: dict[str, Unknown] = {}
        unsure: dict[str, float] = {}
        for index, stage in enumerate(plan.stages):
            machine = machine_of(self.bench.cluster, stage.mesh, self.bench.calibration)
            code = stage_code(lowered, plan, index)
            if not may_run(machine) or model.knows(code, machine):
                continue
            cost, sigma = model.predict(code, machine, alone=True)
            seconds = cost.forward_s + cost.backward_s
            key = stage_work(code).digest
            programs.setdefault(key, Unknown(index, code, machine, seconds, halves))
            unsure[key] = unsure.get(key, 0.0) + sigma * seconds
        return programs[max(unsure, key=lambda key: unsure[key])] if unsure else None

    def learn(self, plan: Plan, stage: Unknown, found: ProfiledStage) -> None:
        """Keeps what a stage of a plan was profiled at: predictions take it into account now.

        Raises:
            ValueError: The figures say nothing.
        """
        if self.learned is None:
            self.learned = self._learned_cost()
        self.learned.observe(
            stage.code,
            stage.machine,
            Seconds(*found.seconds),
            origin=plan.params_hash,
            working_bytes=found.working_bytes,
        )
        self.learned.refit()
        self.version += 1

    def again(self, outcome: Outcome, fidelity: str = "learned") -> Outcome:
        """The outcome with what is predicted now.

        Args:
            outcome: Of a plan that was kept.
            fidelity: ``profiled`` for a plan of which a stage was profiled.
        """
        if self.learned is None or outcome.version == self.version:
            return outcome
        assert outcome.plan is not None
        with _collecting_later():
            played = self._simulate(outcome.plan, self._lower(outcome.plan), self.learned)
        entry = entry_of(outcome.plan, played, self.bench.config.memory_fraction)
        name = "profiled" if "profiled" in outcome.step_s else fidelity
        found = replace(
            outcome, step_s={**outcome.step_s, name: played.step_s}, version=self.version
        )
        if entry.overfull <= max(1.0, outcome.overfull):
            return found
        # More than the analytic model counts: a plan that is told to fit must fit.
        return replace(
            found,
            state="infeasible",
            peak_bytes=max(played.peak_bytes),
            overfull=entry.overfull,
            reason=f"fills its devices {entry.overfull:.2f} times over, by what was measured",
        )

    def observe(self, outcome: Outcome, measured: Measured) -> StepRow:
        """Keeps what was measured of a plan, for this search and for later ones."""
        plan = outcome.plan
        assert plan is not None
        row = StepRow(
            features=dict(outcome.features),
            simulated_s=outcome.predicted_s,
            measured_s=measured.step_s,
            simulated_bytes=outcome.peak_bytes,
            measured_bytes=measured.peak_bytes,
            plan=hashlib.sha256(plan.to_json().encode()).hexdigest()[:16],
            origin=plan.params_hash,
        )
        if self.bench.config.cost_model != "analytic":
            # What later searches read is told of one and the same model: the analytic one.
            self.store.add(replace(row, simulated_s=outcome.step_s["simulated"]))
            LearnedCost(self.store).observe_step(
                self._lower(plan), plan, self.bench.cluster, self.bench.calibration, measured
            )
        return row

    def _simulate(self, plan: Plan, lowered: LoweredPlan, cost: str | CostModel) -> Simulation:
        return simulate(
            self.bench.graph,
            plan,
            self.bench.cluster,
            calibration=self.bench.calibration,
            cost=cost,
            lowered=lowered,
            optimizer_states=self.bench.config.optimizer_states,
        )

    def _lower(self, plan: Plan) -> LoweredPlan:
        return lowered_for_search(self.bench.graph, plan)
