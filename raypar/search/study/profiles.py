"""Stages of plans that may win run alone on one device, before whole steps of any plan do.

One device is enough, however many the plan needs: what is profiled is the one stage whose time is
least sure and weighs most. The learned cost model takes it in, all plans that may win are predicted
anew, and a plan that falls behind is given up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection

from raypar._plan_text import duration
from raypar.errors import RayparError
from raypar.mesh.devices import DeviceKind
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.cost.machine import MeshMachine
from raypar.search.cost.stage_job import job_of
from raypar.search.measure import ProfiledStage, StageProfiler
from raypar.search.profiler import LocalProfiler
from raypar.search.study.judge import Judge, Unknown
from raypar.search.study.ledger import Ledger

_PROFILED = 8
"""Stages that are profiled where someone is given for it and the options do not say how many."""
_REACH = 1.25
"""Plans that are predicted to take up to so many times the least are profiled; one that takes
longer once it is, is given up."""
_FRONT = 12
"""So many of the best plans are predicted anew after every profile."""


class Profiles:
    """Profiles stages of a search's plans.

    Args:
        judge: Looks at plans.
        ledger: What was looked at.
        profiler: Runs stages; None: this process does, if the options say how many.
        config: How many may run.

    Attributes:
        seconds: What profiling took so far.
        last_s: What it took the last time.
        notes: Stages that could not be profiled though their device is there, and why.
    """

    def __init__(
        self, judge: Judge, ledger: Ledger, profiler: StageProfiler | None, config: SearchConfig
    ) -> None:
        self.judge = judge
        self.ledger = ledger
        self.seconds = self.last_s = 0.0
        self.notes: list[str] = []
        self._most = 0
        self._profiler: StageProfiler = profiler or LocalProfiler()
        if config.profile != "auto":
            self._most = config.profile
        elif profiler is not None and config.cost_model != "analytic":
            self._most = _PROFILED
        self._ran = 0
        self._longest = 0.0
        self._tried: set[int] = set()
        self._news: dict[int, float] = {}
        self._lacks: dict[DeviceKind, str] = {}

    @property
    def on(self) -> bool:
        """Whether anything is to be profiled."""
        return self._most > 0

    def absent(self, plan: Plan | None) -> str:
        """Why no stage of a plan can be profiled here; empty where one can, or none is to be."""
        if plan is None or not self.on:
            return ""
        cluster = self.judge.bench.cluster
        kinds = {cluster.node_of(device).device for device in plan.devices}
        reasons = {self._lack(kind) for kind in kinds}
        return "" if "" in reasons else "skipped: " + "; ".join(sorted(reasons))

    def _lack(self, kind: DeviceKind) -> str:
        if kind not in self._lacks:
            self._lacks[kind] = self._profiler.lacks(kind)
        return self._lacks[kind]

    def sharpen(self, left_s: float, *, share: float = 1.0) -> None:
        """Profiles stages of the best plans, one of each, until what is best is known.

        Args:
            left_s: Seconds that are left.
            share: Of the stages that may be profiled, at most so many have been when this ends.
        """
        while self.on and left_s > self._longest:
            number = self._next()
            if number is None or self._spent(share):
                return
            began = time.perf_counter()
            self.look(number, share=share)
            left_s -= time.perf_counter() - began

    def _next(self) -> int | None:
        """The best plan that is within reach and was not tried; None where there is none."""
        outcomes, best = self.ledger.outcomes, self.ledger.best
        if best is None:
            return None
        limit = _REACH * best.predicted_s
        left = [
            n for n, o in outcomes.items()
            if o.state == "kept" and n not in self._tried and o.predicted_s <= limit
        ]  # fmt: skip
        return min(left, key=lambda n: outcomes[n].predicted_s, default=None)

    def _spent(self, share: float) -> bool:
        return self._ran >= math.ceil(self._most * share)

    def look(self, number: int, *, share: float = 1.0) -> bool:
        """Profiles the stage of a trial's plan that decides most, if there is something to learn.

        Args:
            number: Of the trial.
            share: As in `sharpen`.

        Returns:
            Whether predictions are others now: of this plan, and of those that it is up against.
        """
        if number in self._tried or self._spent(share):
            return False
        self._tried.add(number)
        plan = self.ledger.outcomes[number].plan
        assert plan is not None
        if absent := self.absent(plan):
            self.ledger.note_profile(number, absent)
            return False
        stage = self.judge.unknown(plan, self._may_run)
        if stage is None:
            self.ledger.note_profile(number, "all its stages were profiled before")
            return False
        self._ran += 1
        began = time.perf_counter()
        try:
            found = self._run(plan, stage)
            self.judge.learn(plan, stage, found)
        except Exception as error:  # of whatever kind: what was searched so far is worth more
            text = error_words(error)
            self.notes.append(f"a stage could not be profiled: {text}")
            self.ledger.note_profile(number, f"stage {stage.index} failed: {text}")
            return False
        took = max(found.took_s, time.perf_counter() - began)
        self.seconds += took
        self.last_s, self._longest = took, max(self._longest, took)
        self.ledger.note_profile(number, _words(plan, stage, found), took)
        self._predict(number, "profiled")
        self.refresh()
        self._compare(number)
        return True

    def _may_run(self, machine: MeshMachine) -> bool:
        return not self._lack(machine.kinds[0][0])

    def _run(self, plan: Plan, stage: Unknown) -> ProfiledStage:
        """Runs a stage.

        Raises:
            RayparError: It could not run, or what was measured says nothing.
        """
        kind = stage.machine.kinds[0][0]
        cluster = self.judge.bench.cluster
        devices = plan.stages[stage.index].mesh.devices
        device = next(d for d in devices if cluster.node_of(d).device == kind)
        job = job_of(stage.code, halves=stage.halves)
        found = self._profiler.profile_stage(job, kind, device)
        if not (all(math.isfinite(s) and s >= 0.0 for s in found.seconds) and max(found.seconds)):
            raise RayparError(f"its programs were measured at {found.seconds} s")
        return found

    def refresh(self, also: Collection[int] = ()) -> None:
        """Predicts anew what may win, where something was learned since.

        Args:
            also: Further trials.
        """
        outcomes = self.ledger.outcomes
        for number in also:
            self._predict(number)
        while True:
            kept = [n for n, o in outcomes.items() if o.state == "kept"]
            front = sorted(kept, key=lambda n: outcomes[n].predicted_s)[:_FRONT]
            stale = [n for n in front if outcomes[n].version != self.judge.version]
            if not stale:
                return
            for number in stale:
                self._predict(number)

    def _predict(self, number: int, fidelity: str = "learned") -> None:
        self.ledger.note_predicted(number, self.judge.again(self.ledger.outcomes[number], fidelity))

    def _compare(self, number: int) -> None:
        """Gives a profiled plan up if it is behind now."""
        best = self.ledger.best
        outcome = self.ledger.outcomes[number]
        if best is not None and outcome.predicted_s > _REACH * best.predicted_s:
            self.ledger.note_pruned(
                number,
                f"one stage profiled, its step is predicted to take {outcome.predicted_s:.3g} s, "
                f"over {_REACH:g} times the best ({best.predicted_s:.3g} s)",
            )
        self._news[number] = outcome.predicted_s

    def news(self) -> dict[int, float]:
        """Trial → seconds that its step is predicted to take; what is new since last asked."""
        found, self._news = self._news, {}
        return found


def error_words(error: Exception) -> str:
    """An error in one line; what is none of raypar's is told with its kind."""
    return str(error) if isinstance(error, RayparError) else f"{type(error).__name__}: {error}"


def _words(plan: Plan, stage: Unknown, found: ProfiledStage) -> str:
    forward, backward = found.seconds[:2]
    return (
        f"stage {stage.index} of {len(plan.stages)} alone: forward {duration(forward)}, backward "
        f"{duration(backward)}; {duration(stage.seconds)} in all were predicted"
    )
