"""Plans of the exact planners, which a study starts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from raypar.errors import PlanError, RayparError
from raypar.plan import Plan
from raypar.search.config import Auto, SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.planners.base import get_planner, planner_names

SEEDS = ("alpa", "piper", "placement")
_SLOW_UNITS = 64
"""Beyond so many units, the first planner's time does not leave enough for a whole other search."""
_NARROW = ("piper",)
"""Planners that soon know the best stages for one cut of the batch."""
_LEAST_S = 1.0
"""What a planner that is asked is given at least."""


def seed_names(config: SearchConfig, units: int) -> list[str]:
    """The planners that are asked for plans."""
    if config.seeds != "auto":
        return list(config.seeds)
    names = [name for name in SEEDS if name in planner_names()]
    return names if units <= _SLOW_UNITS else [n for n in names if n == names[0] or n in _NARROW]


def seeds(
    bench: Workbench,
    deadline: float,
    latest: float = float("inf"),
    best: Callable[[], Plan | None] = lambda: None,
) -> Iterator[tuple[str, Plan | RayparError]]:
    """(planner, its plan or why there is none) for every planner that is asked.

    Where time is over, or the model long, a planner may still be asked for the replicas and
    microbatches of the plan before: the shardings of these are known by then. It is not where a
    plan that cuts the batch in another way has turned out to be better.

    Args:
        bench: The model on the cluster, with the study's options.
        deadline: `time.perf_counter()` at which planners end their search with what they have, and
            after which only the first one is asked; infinity if time does not matter.
        latest: When no planner is asked any more, in the same clock.
        best: The best plan that is known when the next planner is asked.
    """
    last: Plan | None = None
    slow = len(bench.units) > _SLOW_UNITS
    for index, name in enumerate(seed_names(bench.config, len(bench.units))):
        left = deadline - time.perf_counter()
        narrow = index > 0 and last is not None and name in _NARROW and (slow or left <= 0)
        late = time.perf_counter() > latest
        if index and (late or (left <= 0 and not narrow)):
            yield name, PlanError("no time was left for it")
            continue
        if narrow and last is not None and not _cut_alike(last, best() or last):
            yield name, PlanError("another cut of the batch than it would take is better")
            continue
        budget: float | Auto = max(_LEAST_S, left) if left < float("inf") else "auto"
        config = replace(bench.config, planner=name, cache=False, budget_s=budget)
        if narrow and last is not None:
            config = replace(config, replicas=last.replicas, microbatches=last.microbatches)
        try:
            last = get_planner(name).plan(bench.graph, bench.cluster, config)
        except RayparError as error:
            yield name, error
        else:
            yield name, last


def _cut_alike(one: Plan, other: Plan) -> bool:
    return (one.replicas, one.microbatches) == (other.replicas, other.microbatches)
