"""Planner `manual`: a plan file, or fields that override what `uniform` makes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from raypar.errors import PlanError, did_you_mean
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search.config import SearchConfig
from raypar.search.planners.base import Planner, register_planner
from raypar.search.planners.uniform import UniformPlanner


@register_planner
class ManualPlanner(Planner):
    """Says what to do instead of searching."""

    name = "manual"

    def plan(self, graph: OpGraph, cluster: Cluster, config: SearchConfig) -> Plan:
        """Loads the file, or overrides what `uniform` makes; see `Planner.plan`."""
        given = config.manual
        if given is None:
            raise PlanError(
                "search.planner is 'manual', but search.manual is not set; give the path of a plan "
                "file, or plan fields such as {microbatches: 4}"
            )
        if isinstance(given, str):
            plan = Plan.load(given)
        elif isinstance(given, dict):
            base = UniformPlanner().plan(graph, cluster, config)
            fields = overridden(dataclasses.asdict(base), given)
            try:
                text = json.dumps(fields)
            except (TypeError, ValueError) as error:
                raise PlanError(
                    f"search.manual holds what has no JSON form: {error}; use texts, numbers, "
                    "lists and dicts"
                ) from None
            plan = dataclasses.replace(Plan.from_json(text), planner=self.name)
        else:
            raise PlanError(
                f"search.manual is a {type(given).__name__}; give a path or a dict of plan fields"
            )
        check_plan(plan, graph, cluster)
        return plan


def overridden(base: Any, given: dict[str, Any], where: str = "search.manual") -> Any:
    """`base` with the given fields put in; list entries may be given by index.

    Raises:
        PlanError: A key that the plan does not have.
    """
    result = dict(enumerate(base)) if isinstance(base, (list, tuple)) else dict(base)
    for key, value in given.items():
        place: Any = key
        if isinstance(base, (list, tuple)):
            place = int(key) if str(key).isdigit() else key
        open_ended = where.endswith((".sharding", ".predicted"))
        if place not in result and not open_ended:
            choices = [str(k) for k in result]
            raise PlanError(
                f"{where}: the plan has no {key!r}; it has {', '.join(choices)}."
                f"{did_you_mean(str(key), choices)}"
            )
        nested = isinstance(value, dict) and isinstance(result.get(place), (dict, list, tuple))
        result[place] = overridden(result[place], value, f"{where}.{key}") if nested else value
    return [result[i] for i in sorted(result)] if isinstance(base, (list, tuple)) else result
