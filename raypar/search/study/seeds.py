"""Plans of the exact planners, which a study starts from."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from raypar.errors import RayparError
from raypar.plan import Plan
from raypar.search.config import Auto, SearchConfig
from raypar.search.interop.workbench import Workbench
from raypar.search.planners.base import get_planner, planner_names

SEEDS = ("alpa", "piper", "placement")
_SLOW_UNITS = 64
"""Beyond so many units, only the first planner is asked: the others take long and cut no better."""
_LEAST_S = 1.0
"""What a planner that is asked is given at least."""


def seed_names(config: SearchConfig, units: int) -> list[str]:
    """The planners that are asked for plans."""
    if config.seeds != "auto":
        return list(config.seeds)
    names = [name for name in SEEDS if name in planner_names()]
    return names if units <= _SLOW_UNITS else names[:1]


def seeds(bench: Workbench, deadline: float) -> Iterator[tuple[str, Plan | None, str]]:
    """(planner, its plan, why there is none) for every planner that is asked.

    Args:
        bench: The model on the cluster, with the study's options.
        deadline: `time.perf_counter()` at which planners end their search with what they have, and
            after which only the first one is asked; infinity if time does not matter.
    """
    for index, name in enumerate(seed_names(bench.config, len(bench.units))):
        left = deadline - time.perf_counter()
        if index and left <= 0:
            yield name, None, "no time was left for it"
            continue
        budget: float | Auto = max(_LEAST_S, left) if left < float("inf") else "auto"
        config = replace(bench.config, planner=name, cache=False, budget_s=budget)
        try:
            yield name, get_planner(name).plan(bench.graph, bench.cluster, config), ""
        except RayparError as error:
            yield name, None, str(error)
