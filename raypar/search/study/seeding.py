"""What a study looks at before the sampler proposes: plans that others know to be good."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from raypar.errors import RayparError
from raypar.plan import DATA, Plan
from raypar.search.need import frugal_plans
from raypar.search.study.judge import Judge, Outcome
from raypar.search.study.proposals import Asked, Proposals
from raypar.search.study.regular import REGULAR, has_regular, regular_plans
from raypar.search.study.seeds import seeds
from raypar.search.study.space import Decisions

FRUGAL = "frugal"
"""Who proposes what is tried where nothing else fits."""
_SEED_SHARE, _LESS_SEED_SHARE = 0.6, 0.4
"""Of the budget, that the planners of seeds may take together; the second where devices are alike
and regular plans are looked at, which are the better ones of large clusters."""
_REGULAR_SHARE = 0.8
"""Of the budget, at which no further regular plan is drafted."""
_REGULAR_LEAST_SHARE = 0.12
"""Of the budget, that drafting them may take in any case."""
_LATEST_SEED, _LATEST_END = 1.1, 1.3
"""Shares of the budget: no planner is asked after the first, and no further regular plan looked at
that would take until the second."""

_CLOSE = 1.2
"""Regular plans that take so much longer than the best may be faster under another schedule."""

Write = Callable[[Asked, list[tuple[str, Outcome]]], None]


@dataclass
class Seeding:
    """Looks at plans of the exact planners, at regular plans, and at frugal ones in need.

    Args:
        judge: Says what a plan takes.
        proposals: Finds the decisions near a plan.
        known: What became of decisions that were looked at; more are added here.
        write: Takes what was looked at for one proposal, with who proposed each.
        room: How many more trials may be made.
        best: The best plan that was looked at.
        began: `time.perf_counter()` when the search began.
        budget_s: Seconds it may take; infinity if time does not matter.
    """

    judge: Judge
    proposals: Proposals
    known: dict[Decisions, Outcome]
    write: Write
    room: Callable[[], int]
    best: Callable[[], Plan | None]
    began: float
    budget_s: float

    def __post_init__(self) -> None:
        self.refused: dict[str, RayparError] = {}  # planner → why it had no plan
        self._regular = False  # whether regular plans were looked at
        # Where devices differ, there are tables for every kind of place: those of one axis take
        # little of the budget.
        self._axes = None if self.judge.bench.alike else 1

    def exact(self) -> None:
        """Asks the exact planners, and looks at what can be proposed near their plans.

        Regular plans are looked at on the way, before planners that are asked although their time
        is over.
        """
        less = self.judge.bench.alike and has_regular(self.judge.bench)
        deadline = self.began + (_LESS_SEED_SHARE if less else _SEED_SHARE) * self.budget_s
        latest = self.began + _LATEST_SEED * self.budget_s
        for name, plan in seeds(self.judge.bench, deadline, latest, self.best):
            if isinstance(plan, RayparError):
                self.refused[name] = plan
                continue
            asked = self.proposals.near_plan(plan, name)
            # Its own cuts and shardings are no decisions: what is told for these is the better.
            looked = [(name, self.judge.play(plan))]
            if self.room() > 1 and asked.decisions not in self.known:
                near = self.judge.look(asked.decisions, axes=self._axes)
                self.known[asked.decisions] = near
                looked.append((f"near {name}", near))
            self.write(asked, looked)
            if self.room() <= 0:
                return
            if time.perf_counter() > deadline:
                self.regular()

    def regular(self) -> None:
        """Looks at regular plans, which no exact planner makes, once."""
        if self.judge.bench.config.seeds != "auto" or self._regular:
            return
        self._regular = True
        if time.perf_counter() > self.began + self.budget_s and not self.judge.bench.alike:
            return  # where devices are alike the first one mostly wins: it is looked at in any case
        least = time.perf_counter() + _REGULAR_LEAST_SHARE * self.budget_s
        deadline = max(least, self.began + _REGULAR_SHARE * self.budget_s)
        took = 0.0
        found = regular_plans(self.judge.drafter, deadline)
        for index, decisions in enumerate(found):
            latest = self.began + _LATEST_END * self.budget_s - took
            if self.room() <= 0 or (index and time.perf_counter() > latest):
                return
            began = time.perf_counter()
            outcome = self.judge.look(decisions, axes=self._axes)
            took = max(took, time.perf_counter() - began)
            if outcome.plan is None:
                continue
            looked, axes = [(REGULAR, outcome)], self._axes
            # The solver takes two axes also for a gain that a simulated step does not show.
            if self.room() > 1 and _two_axes(outcome.plan):
                looked.append((REGULAR, self.judge.look(decisions, axes=1)))
                axes = axes if best_of(looked) is outcome else 1
                took = max(took, time.perf_counter() - began)
            self.known[decisions] = best_of(looked)
            self.write(self.proposals.near_plan(outcome.plan, REGULAR), looked)
            if self._may_lead(self.known[decisions]):
                self._other_schedules(decisions, axes, spare=len(found) - 1 - index)

    def _may_lead(self, outcome: Outcome) -> bool:
        """Whether a plan is near enough to the best one to overtake it by its schedule."""
        best = self.best()
        if best is None or outcome.plan is None or outcome.state != "kept":
            return False
        return outcome.plan.predicted["step_s"] <= _CLOSE * best.predicted["step_s"]

    def _other_schedules(self, decisions: Decisions, axes: int | None, spare: int) -> None:
        """Looks at a plan under other schedules, while there is time.

        Its stages are lowered already; but where another schedule holds too much, they are
        sharded and lowered anew.

        Args:
            decisions: The plan's.
            axes: As in `Drafter.draft`.
            spare: Trials that are left for the regular plans to come.
        """
        space = self.judge.space
        for name in space.schedules if decisions.chunks == 1 else space.interleaved:
            other = replace(decisions, schedule=name)
            if other in self.known:
                continue
            if self.room() <= spare or time.perf_counter() > self.began + self.budget_s:
                return
            outcome = self.known[other] = self.judge.look(other, axes=axes)
            if outcome.plan is not None:
                asked = self.proposals.near_plan(outcome.plan, REGULAR)
                self.write(asked, [(REGULAR, outcome)])

    def frugal(self) -> None:
        """Where nothing fits: plans that hold as little as plans can."""
        bench = self.judge.bench
        for plan in frugal_plans(bench.graph, bench.cluster, bench.config):
            outcome = self.judge.play(plan)
            if outcome.state == "kept":
                self.write(self.proposals.near_plan(plan, FRUGAL), [(FRUGAL, outcome)])


def best_of(looked: list[tuple[str, Outcome]]) -> Outcome:
    """The fastest that can run; of those that cannot, the first."""
    outcomes = [outcome for _, outcome in looked]
    kept = [outcome for outcome in outcomes if outcome.state == "kept"]
    return min(kept, key=lambda outcome: outcome.predicted_s) if kept else outcomes[0]


def _two_axes(plan: Plan) -> bool:
    """Whether the ops of a stage are sharded over more than one axis."""

    def inner(sizes: Mapping[str, int]) -> int:
        return sum(size > 1 for name, size in sizes.items() if name != DATA)

    return any(inner(dict(stage.mesh.named)) > 1 for stage in plan.stages)
