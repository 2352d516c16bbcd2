"""The last step of a search: the best pipelines, with several schedules, are played in time.

The search prices stages with quick figures and knows one schedule. What it found fastest is lowered
and simulated as it would run (`raypar.search.simulate`), and the fastest plan that fits the memory
by the exact figures wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raypar.errors import ScheduleError
from raypar.graph.opgraph import OpGraph
from raypar.lowered import lower_plan, with_schedule
from raypar.mesh.calibration import Calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.cost.analytic import AnalyticCost
from raypar.search.simulate import simulate
from raypar.search.simulation import Simulation

SCHEDULES = ("1f1b", "zero_bubble_h1", "gpipe")
"""Schedules that every pipeline is tried with where the options leave it open."""
_MOST_SLOTS = 4096
"""Up to so many stages × microbatches, all plans are played; beyond, only the first one."""
_MOST_ALTERNATIVES = 8


@dataclass(frozen=True)
class Entry:
    """A plan that was played.

    Attributes:
        plan: The plan, with what the simulation says about it.
        step_s: Seconds of a step.
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
    """
    found: list[Entry] = []
    for plan in plans:
        small = len(plan.stages) * plan.microbatches <= _MOST_SLOTS
        if found and not small:
            break
        for one in _lowered(plan, graph, schedule, every=small):
            tried, played = one(graph, cluster, calibration, optimizer_states)
            found.append(_entry(tried, played, memory_fraction))
    return sorted(found, key=lambda e: (e.overfull > 1.0, e.step_s))


@dataclass(frozen=True)
class _Try:
    """A plan with the lists of one schedule, ready to be played."""

    plan: Plan
    lowered: object

    def __call__(self, *_: object) -> None: ...


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
