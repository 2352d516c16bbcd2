"""The last step of a search: the best pipelines, with several schedules, are played in time.

The search prices stages with quick figures and knows one schedule. What it found fastest is lowered
and simulated as it would run (`raypar.search.simulate`), and the fastest plan that fits the memory
by the exact figures wins.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from raypar.errors import NothingFitsError, ScheduleError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.lowered import LoweredPlan
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search._sim_input import Setting
from raypar.search._sim_setting import setting_of
from raypar.search.config import SearchConfig
from raypar.search.cost.base import total_s
from raypar.search.interop.likely import Likely, likely, played_whole
from raypar.search.lowering import lowered_for_search
from raypar.search.simulation import Simulation

SCHEDULES = ("1f1b", "eager_1f1b", "zero_bubble_h1", "gpipe")
"""Schedules that every pipeline is tried with where the options leave it open."""
_PLAYED = 3
"""So many plans (with their schedules) are played whole, more where none of them fits."""
_CLOSE = 1.1
"""Plans that likely take so much longer than the best are not played."""
_SURE = 1.05
"""A plan that fills so much of what it may, by a few microbatches, is not played whole to know that
it does not fit. What is chosen was played whole."""
_MOMENT_S, _MOMENT = 6.0, 0.1
"""A contest whose time is over may still play a second plan, if that likely takes no more seconds
and no more of the budget: where the stages of plans are known, several take less."""
_MOST_OPS = 2000
"""Plans are lowered as long as they have so many ops together. Tracing the stages of a plan takes
milliseconds for each op, so that a large model's plan takes seconds."""
_MOST_ALTERNATIVES = 8
_ATTEMPTS = 4
"""Searches with less and less memory."""
_MARGIN = 0.98
"""What the next of them may fill of what would have been enough for the last one."""


@dataclass(frozen=True)
class Entry:
    """A plan that was played.

    Attributes:
        plan: The plan, with what the simulation says about it.
        step_s: Seconds of a step; what it likely takes, where few microbatches show that the plan
            does not fit.
        overfull: Most bytes that a device holds, as a multiple of what it may fill.
    """

    plan: Plan
    step_s: float
    overfull: float


def contest(
    plans: Sequence[Plan],
    graph: OpGraph,
    cluster: Cluster,
    calibration: Calibration,
    *,
    schedule: str = "auto",
    optimizer_states: int = 2,
    memory_fraction: float = 0.9,
    until: float = math.inf,
    moment_s: float = _MOMENT_S,
) -> list[Entry]:
    """Plays plans, the fastest that fits first; those that do not fit come last.

    Args:
        plans: Plans of one graph, the most promising first.
        graph: The captured model.
        cluster: The devices.
        calibration: What they reach.
        schedule: The schedule of all plans, or ``auto``: each of `SCHEDULES` that takes them.
        optimizer_states: Tensors that the optimizer keeps per parameter (Adam: 2).
        memory_fraction: Share of a device's memory that may be filled.
        until: Once one plan fits, no further one is begun that would end, if it takes as long as
            the last one, more than a moment after this `time.perf_counter()`, or after now if that
            is later.
        moment_s: Seconds of that moment.
    """
    runs: list[_Run] = []
    latest, took = max(until, time.perf_counter()) + moment_s, 0.0
    for plan in plans[: most_played(graph)]:
        began = time.perf_counter()
        late = began + took > latest
        if late and any(_entry(run, memory_fraction).overfull <= 1.0 for run in runs):
            break
        runs += _runs_of(plan, graph, cluster, calibration, schedule, optimizer_states)
        took = time.perf_counter() - began
    runs.sort(key=lambda run: run.likely.step_s)
    found: list[Entry] = []
    for run in runs:
        fits = any(entry.overfull <= 1.0 for entry in found)
        if fits and (len(found) >= _PLAYED or run.likely.step_s > _CLOSE * runs[0].likely.step_s):
            break
        entry = _entry(run, memory_fraction)
        if entry.overfull <= _SURE and not run.likely.whole:
            entry = entry_of(
                run.plan, played_whole(run.plan, run.lowered, run.setting), memory_fraction
            )
        found.append(entry)
    return sorted(found, key=lambda e: (e.overfull > 1.0, e.step_s))


def most_played(graph: OpGraph, least: int = 2) -> int:
    """How many plans of a model a contest takes.

    Args:
        graph: The model.
        least: So many at least, however large it is.
    """
    return max(least, _MOST_OPS // len(graph.ops))


def best_that_fits(
    plans_of: Callable[[float], Sequence[Plan]],
    graph: OpGraph,
    cluster: Cluster,
    config: SearchConfig,
    calibration: Calibration,
    until: float = math.inf,
) -> Plan:
    """Plays what a search finds; where nothing fits, it searches again with as much less memory.

    The figures of memory that a search goes by are rough, those of a played plan are near.

    Args:
        plans_of: Searches: share of the memory that may be filled → plans, most promising first.
        graph: The captured model.
        cluster: The devices.
        config: Schedule, optimizer states, and what may be filled.
        calibration: What the devices reach.
        until: See `contest`.

    Raises:
        NothingFitsError: Nothing is found, or nothing fits.
    """
    budget_s = math.inf if config.budget_s == "auto" else config.budget_s
    share = 1.0
    for _ in range(_ATTEMPTS):
        plans = plans_of(share)
        if not plans:
            break
        entries = contest(
            plans,
            graph,
            cluster,
            calibration,
            schedule=config.schedule,
            optimizer_states=config.optimizer_states,
            memory_fraction=config.memory_fraction,
            until=until,
            moment_s=min(_MOMENT_S, _MOMENT * budget_s),
        )
        if entries[0].overfull <= 1.0:
            plan = winner(entries)
            check_plan(plan, graph, cluster)
            return plan
        share *= _MARGIN / min(entry.overfull for entry in entries)
    raise NothingFitsError(f"no plan that planner {config.chosen_planner} found fits the memory")


@dataclass(frozen=True)
class _Run:
    """A plan under one schedule: what it would be played with, and what it likely comes to."""

    plan: Plan
    lowered: LoweredPlan
    setting: Setting
    likely: Likely


def _entry(run: _Run, memory_fraction: float) -> Entry:
    return entry_of(run.plan, run.likely.played, memory_fraction, run.likely.peak_bytes)


def _runs_of(
    plan: Plan,
    graph: OpGraph,
    cluster: Cluster,
    calibration: Calibration,
    schedule: str,
    optimizer_states: int,
) -> Iterator[_Run]:
    lowered = lowered_for_search(graph, plan)
    setting = setting_of(
        graph, plan, lowered, cluster, calibration, "analytic", None, optimizer_states
    )
    for name in _schedules(plan, schedule):
        tried = replace(plan, schedule=replace(plan.schedule, name=name))
        with contextlib.suppress(ScheduleError):
            yield _Run(tried, lowered, setting, likely(tried, lowered, setting))


def _schedules(plan: Plan, schedule: str) -> list[str]:
    """The schedules to try, the plan's own first; they differ in pipelines only."""
    own = plan.schedule.name
    if schedule != "auto" or len(plan.stages) == 1 or plan.microbatches == 1:
        return [own]
    return [own, *(name for name in SCHEDULES if name != own)]


def entry_of(
    plan: Plan,
    played: Simulation,
    memory_fraction: float,
    peak_bytes: Sequence[int] | None = None,
) -> Entry:
    """The plan with what its simulation says.

    Args:
        plan: What was played.
        played: Its simulation.
        memory_fraction: Share of a device's memory that may be filled.
        peak_bytes: By lane, what is held at most; None: as it was played.
    """
    setting = played.setting
    most = played.peak_bytes if peak_bytes is None else peak_bytes
    peaks: dict[int, int] = {}
    for lane, peak in zip(played.lanes, most, strict=True):
        for stage in lane.stages:
            peaks[stage] = max(peaks.get(stage, 0), peak)
    stages = []
    for index, (one, cost) in enumerate(zip(plan.stages, setting.costs, strict=True)):
        figures = {
            "forward_s": cost.forward_s + total_s(cost.forward_comm),
            "backward_s": cost.backward_s + total_s(cost.backward_comm),
            "peak_bytes": float(peaks[index]),
        }
        stages.append(replace(one, predicted=figures))
    figures = {
        "step_s": played.step_s,
        "bubble": played.bubble,
        "peak_bytes": float(max(most)),
    }
    limits = [memory_fraction * lane.memory_limit for lane in played.lanes]
    overfull = max(p / m for p, m in zip(most, limits, strict=True))
    return Entry(replace(plan, stages=tuple(stages), predicted=figures), played.step_s, overfull)


def winner(entries: Sequence[Entry]) -> Plan:
    """The first entry's plan, which names the others as its alternatives."""
    first, *others = entries
    named: dict[str, float] = {}
    for entry in others:
        text = in_words(entry.plan)
        if entry.overfull > 1.0:
            text += ", does not fit the memory"
        if text != in_words(first.plan):
            named.setdefault(text, entry.step_s)
    kept = dict(sorted(named.items(), key=lambda item: item[1])[:_MOST_ALTERNATIVES])
    return replace(first.plan, alternatives=kept)


def in_words(plan: Plan) -> str:
    """What tells a plan from others of its model, in one line."""
    stages, meshes = len(plan.stages), [s.mesh.inner for s in plan.stages]
    shapes = ["×".join(str(n) for _, n in mesh) or "1" for mesh in meshes]
    parts = [
        f"{stages} stage{'s' * (stages > 1)} × {plan.replicas} "
        f"replica{'s' * (plan.replicas > 1)} × {plan.microbatches} "
        f"microbatch{'es' * (plan.microbatches > 1)}",
        f"sharded over {_runs(shapes)}" if set(shapes) != {"1"} else "",
        f"recompute {_runs([s.memory.recompute for s in plan.stages])}",
        f"zero {_runs([str(s.memory.zero) for s in plan.stages])}",
        plan.schedule.name if stages > 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def _runs(texts: Sequence[str]) -> str:
    """Equal neighbours once: ``a a b`` → ``a, then b``."""
    short = [t for i, t in enumerate(texts) if i == 0 or t != texts[i - 1]]
    return " then ".join(short)
